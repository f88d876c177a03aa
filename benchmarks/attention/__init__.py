"""tree_attention and merge_states."""
