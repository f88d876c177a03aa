"""The rules of acceptance, all in accept.py, and how many tokens a call of the target gives with each (lengths.py)."""
