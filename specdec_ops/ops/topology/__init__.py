"""The shape of drafts: build_topology's definition (its public side is specdec_ops/topology.py), and grown trees."""
