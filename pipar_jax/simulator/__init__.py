"""Predicts a round: the schedule and dispatchers of the runtime, driven by durations.

``simulate(schedule, costs)`` runs the dispatchers of the runtime, with hosts, links, codec
workers and credits as queues, and returns a ``Trace``, as recorded by a run.
"""

from pipar_jax.cost_model.costs import Bytes, Costs, LinkModel, Seconds, no_cost
from pipar_jax.simulator.engine import Prediction, simulate

__all__ = ["Bytes", "Costs", "LinkModel", "Prediction", "Seconds", "no_cost", "simulate"]
