"""Averaging of replicas: the registered rules and who applies them."""
