"""Measurement behind `experiments.bench_*`: harness, peers, settings, trials. Not in the wheel."""
