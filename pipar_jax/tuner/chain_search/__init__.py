"""The best cuts of a chain and the best order of its nodes, exactly and without an ILP solver.

A model's layers are dealt in contiguous runs to compute nodes of different speed and memory. Four
objectives share one search (``search.py``):

* ``mpsl``: MP-SL's own (Tirana, Lalis and Chatzopoulos, arXiv 2402.00208): the longest forward of
  any node plus the longest backward of any, links free.
* ``steady``: what a pipeline full of K owners' batches costs per batch,
  ``max(max_i (f + b)_i, busiest link, owner's cycle / K)``, since a node serves both directions
  with one processor. The owner's cycle is its own compute, its four transfers and the chain.
* ``accept``: AccEPT's partition (Chen et al., arXiv 2311.05827): the longest stage or transfer,
  the latter with the compressed bytes and the codec's time.
* ``step``: what a step takes per batch, from an empty pipeline to an empty one: one of m parts
  (each owner's micro-batches) takes its cycle, the others follow at the pace of the busiest
  resource, ``cycle / m + (1 - 1 / m) * load``.

Where there are several codecs to choose from, every boundary has those that are the best for it.
"""

from pipar_jax.tuner.chain_search.layer_table import read_profile
from pipar_jax.tuner.chain_search.problem import (
    ChainPlan,
    ChainProblem,
    ChainStage,
    Coding,
    Layer,
    Node,
    Objective,
    Owner,
    Pair,
)
from pipar_jax.tuner.chain_search.search import evaluate, plan_chain

__all__ = [
    "ChainPlan",
    "ChainProblem",
    "ChainStage",
    "Coding",
    "Layer",
    "Node",
    "Objective",
    "Owner",
    "Pair",
    "evaluate",
    "plan_chain",
    "read_profile",
]
