"""build_topology: trees of every step."""
