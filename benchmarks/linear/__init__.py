"""`linear`: a model's products of few rows."""
