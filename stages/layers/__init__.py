"""Layers that choose the fastest exact formulation for a shape and a platform."""

from stages.layers.conv import Conv
from stages.layers.dense import Dense, Flatten
from stages.layers.dropout import Dropout
from stages.layers.norm import BatchNorm, GroupNorm, make_norm
from stages.layers.pool import average_pool, global_average_pool, max_pool

__all__ = [
    "BatchNorm",
    "Conv",
    "Dense",
    "Dropout",
    "Flatten",
    "GroupNorm",
    "average_pool",
    "global_average_pool",
    "make_norm",
    "max_pool",
]
