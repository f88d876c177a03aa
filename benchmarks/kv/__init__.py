"""kv_propagate: keys and values of layers that an exit skipped."""
