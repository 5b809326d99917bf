"""Presets: each module has ``get_config()``, which returns a ``pipar_jax.config.Config``."""
