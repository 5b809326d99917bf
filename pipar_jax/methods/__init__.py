"""Methods as values: each maps a configuration to a plan."""
