"""What new rows, accepted rows, stacked rows of all layers and rows of skipped layers cost."""
