"""Pipelined collaborative training on edge devices: FL, SL, SFL, PiPar and related methods.

The names below are loaded on first use, so that importing the package, reading a configuration or
launching processes does not load jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipar_jax.config import Config
    from pipar_jax.cost_model.profile import Profile
    from pipar_jax.launch.api import train
    from pipar_jax.launch.finished_run import Run, load
    from pipar_jax.launch.take_part import run_device, run_node, run_server
    from pipar_jax.methods.resolution import resolve
    from pipar_jax.schedule.plan import DevicePlan, Plan
    from pipar_jax.schedule.trace import Trace
    from pipar_jax.tuner import simulate, tune

__version__ = "0.1.0"

__all__ = ["Config", "DevicePlan", "Plan", "Profile", "Run", "Trace", "load", "resolve",
           "run_device", "run_node", "run_server", "simulate", "train", "tune"]  # fmt: skip

_HOMES = {
    "Config": "pipar_jax.config",
    "DevicePlan": "pipar_jax.schedule.plan",
    "Plan": "pipar_jax.schedule.plan",
    "Profile": "pipar_jax.cost_model.profile",
    "Run": "pipar_jax.launch.finished_run",
    "Trace": "pipar_jax.schedule.trace",
    "load": "pipar_jax.launch.finished_run",
    "resolve": "pipar_jax.methods.resolution",
    "run_device": "pipar_jax.launch.take_part",
    "run_node": "pipar_jax.launch.take_part",
    "run_server": "pipar_jax.launch.take_part",
    "simulate": "pipar_jax.tuner",
    "train": "pipar_jax.launch.api",
    "tune": "pipar_jax.tuner",
}


def __getattr__(name: str) -> Any:
    """Loads a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pipar_jax' has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(_HOMES[name]), name)
