"""Confidence of hidden rows at an exit, and whether to leave there."""
