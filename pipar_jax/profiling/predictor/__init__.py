"""Predicts how long layers take on a device from a few seconds of measuring it.

A reconstruction of AccEPT's latency predictor (Chen et al., arXiv 2311.05827, of which only the
abstract is public): ``operators`` reads what a unit computes from its shapes, ``latency_model`` is
the small MLP that all devices share, ``device_fit`` learns one device from its reference layers
(``reference``), ``online`` goes on learning from the stage times of a training, ``predict_host``
makes the profile that the tuner takes. The network that is shipped was trained and judged by
``experiments/latency_data``.
"""
