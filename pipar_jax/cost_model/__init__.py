"""What hosts and links cost: profiles, and the durations that the simulator and the tuner read."""
