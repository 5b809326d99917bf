"""What is to be done, as data: plans, actions, dispatch and traces. No jax."""
