"""Differential privacy: what releases cost, a ledger of them, noise, and randomised labels."""
