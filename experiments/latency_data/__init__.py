"""The latency predictor's data: collecting, reading, training on and evaluating layer times.

Not in the wheel. ``collect`` times layers on many kinds of devices, ``published_tables`` reads
published ones, ``timings`` is the data set, ``training`` trains the network of the wheel,
``baselines`` and ``evaluation`` evaluate it.
"""
