"""Flax models as named units, and their stages as compiled functions. No sockets, no threads.

Names are loaded on first use, so ``import stages`` and ``stages.MODELS`` load no jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from stages.allocator import retain_memory, return_memory
from stages.errors import StageError
from stages.micro_batch_context import MicroBatchContext, make_draw
from stages.names import MODELS, NORMS, STEMS

if TYPE_CHECKING:
    from stages.analysis import Facts, residual_bytes, stage_facts, unit_facts
    from stages.model import Model, Obstacle, parameter_count
    from stages.program import Program
    from stages.registry import build
    from stages.residuals import Residuals
    from stages.stage import Stage, join, predict, select, split
    from stages.stage_programs import Metrics
    from stages.tasks.registry import make_task
    from stages.tasks.task import Metric, Task, WholeMetric
    from stages.tracing import trace
    from stages.trees import OptState, Variables
    from stages.update import Joint, init_opt_state, make_update

_HOMES = {
    "build": "stages.registry",
    "Facts": "stages.analysis",
    "stage_facts": "stages.analysis",
    "residual_bytes": "stages.analysis",
    "unit_facts": "stages.analysis",
    "Model": "stages.model",
    "Obstacle": "stages.model",
    "Variables": "stages.trees",
    "parameter_count": "stages.model",
    "Program": "stages.program",
    "Residuals": "stages.residuals",
    "Metrics": "stages.stage_programs",
    "Stage": "stages.stage",
    "join": "stages.stage",
    "predict": "stages.stage",
    "select": "stages.stage",
    "split": "stages.stage",
    "make_task": "stages.tasks.registry",
    "Metric": "stages.tasks.task",
    "Task": "stages.tasks.task",
    "WholeMetric": "stages.tasks.task",
    "trace": "stages.tracing",
    "OptState": "stages.trees",
    "Joint": "stages.update",
    "init_opt_state": "stages.update",
    "make_update": "stages.update",
}

__all__ = [
    "MODELS",
    "NORMS",
    "STEMS",
    "Facts",
    "Joint",
    "Metric",
    "Metrics",
    "MicroBatchContext",
    "Model",
    "Obstacle",
    "OptState",
    "Program",
    "Residuals",
    "Stage",
    "StageError",
    "Task",
    "Variables",
    "WholeMetric",
    "build",
    "init_opt_state",
    "join",
    "make_draw",
    "make_task",
    "make_update",
    "parameter_count",
    "predict",
    "residual_bytes",
    "retain_memory",
    "return_memory",
    "select",
    "split",
    "stage_facts",
    "trace",
    "unit_facts",
]


def __getattr__(name: str) -> Any:
    """Loads a public name from the module that defines it.

    Raises:
      AttributeError: There is no such name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'stages' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
