"""What is done to keys and values besides attention.

`kv_append`: new rows. `kv_commit`: accepted rows. `gather_layer_kv`: rows of all layers. `kv_propagate`: those of
layers that an exit skipped.
"""
