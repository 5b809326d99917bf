"""The latency predictor's data: collecting, reading, training on and evaluating layer times.

Not in the wheel. ``collect`` times layers on many kinds of devices, ``published_tables`` reads
those of others, ``timings`` is the data set, ``training`` makes the network that the wheel ships,
``baselines`` and ``evaluation`` judge it.
"""
