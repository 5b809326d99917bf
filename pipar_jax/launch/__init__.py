"""Starting runs: the library's front door, processes, flags and certificates."""
