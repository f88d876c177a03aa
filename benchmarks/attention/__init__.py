"""Inputs, exact results and contestants of the family's ops."""
