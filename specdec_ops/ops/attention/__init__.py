"""Attention over a tree of queries, and the merge of partial results."""
