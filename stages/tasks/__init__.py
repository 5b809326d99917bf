"""What a model is trained for: losses, metrics and targets as values. Making them loads no jax."""
