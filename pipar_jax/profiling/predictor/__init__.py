"""Predicts the times of layers on a device from a few seconds of measurements.

A reconstruction of AccEPT's latency predictor (Chen et al., arXiv 2311.05827, of which only the
abstract is public): ``operators`` derives the operators of a unit from its shapes,
``latency_model`` is the small MLP that all devices share, ``device_fit`` fits a device to its
reference layers (``reference``), ``online`` continues to learn from stage times during training,
``predict_host`` creates the profile for the tuner. The network of the package was trained and
evaluated by ``experiments/latency_data``.
"""
