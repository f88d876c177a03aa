"""`build_topology`: trees that change every step. `grow_tree`, `prune_tree`: rounds of trees that a draft grows."""
