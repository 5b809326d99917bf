"""Replicas of stages, their optimiser, their compilation and their weights on disk."""
