"""`build_topology`: the topology of trees that change every step."""
