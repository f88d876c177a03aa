"""Benchmarks of specdec_ops. Run from the repository root: `python -m benchmarks.run`. Never installed."""
