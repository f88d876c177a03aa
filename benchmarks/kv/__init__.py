"""`gather_layer_kv`, `kv_commit` and `kv_propagate`: rows of all layers, accepted rows, skipped layers' rows."""
"""`kv_append`, new rows into the cache; `kv_propagate`, those of layers that an exit skipped."""
