"""What all benchmarks share: timing, roofs, results, targets, plots."""
