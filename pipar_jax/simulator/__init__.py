"""Predicts a round: the schedule and the policy of the runtime, driven by durations.

``simulate(schedule, costs)`` runs the dispatchers that the runtime runs, with hosts, links, ports,
codec workers and credits as queues, and returns the same ``Trace`` type that a run records.
"""

from pipar_jax.cost_model.costs import Bytes, Costs, LinkModel, Port, Seconds, no_cost
from pipar_jax.simulator.engine import Prediction, simulate

__all__ = ["Bytes", "Costs", "LinkModel", "Port", "Prediction", "Seconds", "no_cost", "simulate"]
