"""Files that are whole or not there, JSON without NaN, and the log of events."""
