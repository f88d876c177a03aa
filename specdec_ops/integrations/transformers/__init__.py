"""Hugging Face models in our engine, and our ops in Hugging Face's loops.

load          a decoder-only model of the supported families, as a target or draft of the engine
tree_decode   a loop for `model.generate(..., custom_generate=tree_decode, draft=...)`
patch         our products, norms and attention inside a model's own modules, for its own loops
register      our attention under the name "specdec_ops", for any model in any loop
TreeView      where the rows of a pass stand, for that attention
"""

from .attention import TreeView as TreeView
from .attention import register as register
from .generate import tree_decode as tree_decode
from .load import load as load
from .patch import Patch as Patch
from .patch import patch as patch
