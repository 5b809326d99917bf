"""Measurement code behind ``experiments.bench_*``. Not in the wheel."""
