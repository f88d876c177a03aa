"""`exit_confidence`, `screened_exit`, `bounded_exit` and `exit_mlp`: whether a draft may stop."""
