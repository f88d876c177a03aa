"""`kv_propagate`: keys and values of the layers that an exit skipped."""
