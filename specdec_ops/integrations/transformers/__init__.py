"""Hugging Face models in our engine, and our ops in Hugging Face's loops.

    load    any decoder-only model of the supported families, as a target or draft of the engine
"""

from .load import load as load
