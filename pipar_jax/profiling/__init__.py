"""Measures hosts and links, and predicts their times from a few reference layers."""
