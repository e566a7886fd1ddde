"""What text holds, before a model is trained on it."""
