"""Decode loops that benchmarks measure, and what they need: models with nothing to download, and proofs of the text."""
