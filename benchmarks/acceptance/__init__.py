"""The acceptance rules, and how many tokens a call of the target gives with each (lengths.py)."""
