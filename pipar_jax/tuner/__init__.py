"""The tuner: finds the plan with the shortest epoch from a profile of hosts and links.

``search`` searches jointly over method, cut, N, codec and dispatch policy; ``tune`` returns its
best plan, or the paper's own selection; ``measure`` makes the profile.
"""

from pipar_jax.simulator.predict import PlanEstimate, StageCosts, loads, simulate
from pipar_jax.tuner.bounds import memory_bytes
from pipar_jax.tuner.plan_labels import labels
from pipar_jax.tuner.search import SearchResult, search, tune

__all__ = [
           "PlanEstimate",
           "SearchResult",
           "StageCosts",
           "labels",
           "loads",
           "memory_bytes",
           "search",
           "simulate",
           "tune",
]  # fmt: skip
