"""Costs of hosts and links: profiles, and the durations that simulator and tuner use."""
