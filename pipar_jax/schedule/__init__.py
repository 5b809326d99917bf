"""Schedules as data: plans, actions, dispatch and traces. No jax."""
