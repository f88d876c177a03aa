"""`gather_layer_kv`, `kv_commit` and `kv_propagate`: rows of all layers, accepted rows, skipped layers' rows."""
