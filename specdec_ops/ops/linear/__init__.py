"""Products of few rows with a matrix of weights, and the norm of rows."""
