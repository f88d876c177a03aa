"""Everything on a machine with an NVIDIA GPU: python -m benchmarks.gpu."""
