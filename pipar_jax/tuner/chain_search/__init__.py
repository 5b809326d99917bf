"""Exact search for the cuts of a chain and the order of its nodes, without an ILP solver.

Contiguous runs of a model's layers are assigned to compute nodes with different speed and memory.
Four objectives share one search (``search.py``):

* ``mpsl``: that of MP-SL (Tirana, Lalis and Chatzopoulos, arXiv 2402.00208): the longest forward of
  any node plus the longest backward of any node, without links.
* ``steady``: the time per batch of a pipeline filled by K owners, ``max(max_i (f + b)_i, busiest
  link, owner's cycle / K)``, since a node serves both directions with one processor. The owner's
  cycle is its own compute, its four transfers and the chain.
* ``accept``: AccEPT's partition (Chen et al., arXiv 2311.05827): the longest stage or transfer,
  the latter with the compressed bytes and the codec's time.
* ``step``: the time per batch of a step that starts and ends with an empty pipeline: one of m parts
  (each owner's micro-batches) takes its cycle, the others follow at the pace of the busiest
  resource, ``cycle / m + (1 - 1 / m) * load``.

With several candidate codecs, every boundary has the best for itself.
"""

from pipar_jax.tuner.chain_search.layer_table import read_profile
from pipar_jax.tuner.chain_search.problem import (
    ChainPlan,
    ChainProblem,
    ChainStage,
    Coding,
    DataOwner,
    Layer,
    Node,
    Objective,
    Pair,
)
from pipar_jax.tuner.chain_search.search import evaluate, plan_chain

__all__ = [
    "ChainPlan",
    "ChainProblem",
    "ChainStage",
    "Coding",
    "DataOwner",
    "Layer",
    "Node",
    "Objective",
    "Pair",
    "evaluate",
    "plan_chain",
    "read_profile",
]
