"""The latency predictor's data set: how it is collected, trained on and evaluated. Not in the wheel."""
