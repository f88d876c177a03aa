"""`linear`: a model's products of few rows. `rms_norm`: the norm of rows, with what is added behind it."""
