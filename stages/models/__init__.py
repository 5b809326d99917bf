"""The registered networks, each an ordered list of named units."""
