"""`kv_append`, new rows into the cache; `kv_propagate`, those of layers that an exit skipped."""
