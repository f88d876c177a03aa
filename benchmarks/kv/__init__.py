"""`kv_append`, `kv_commit`, `gather_layer_kv`, `kv_propagate`: new rows, accepted rows, rows of all layers, skipped layers."""
