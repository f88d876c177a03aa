"""`tree_attention` and `merge_states`; the other libraries' ways to attend over a tree."""
