"""The definition of build_topology, whose public side is specdec_ops/topology.py."""
