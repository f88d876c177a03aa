"""The public ops by family. Each folder has the ops with their checks, and their definitions (reference_*.py)."""
