"""Measurement code behind `experiments.bench_*`: harness, peers, settings and trials. Not in the wheel."""
