"""Measuring what hosts and links can do, and predicting it from a few reference layers."""
