"""The definitions: plain PyTorch, written to be read. They are what backend="torch" runs.

Every other backend is tested against these. They compute in float64 when their inputs are float64 and in float32
otherwise, loop over the requests, and may wait for the device.
"""
