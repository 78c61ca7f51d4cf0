"""What a model is worth: held-out losses with their errors, by n-gram frequency, and choices."""
