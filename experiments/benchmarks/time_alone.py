"""Times a host's compiled functions separately, in its own process on chosen cores.

These are the inputs of a prediction before a run: each function at each micro-batch size,
dispatched and awaited as in training, with nothing else on the core.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipar_jax import config as configuration
from pipar_jax.config import Config
from pipar_jax.launch.pinning import run_pinned
from pipar_jax.schedule.plan import Plan
from stages.signature import Signature

#: Seconds by (first unit, last unit, kind, samples); an update has 0 samples.
Alone = dict[tuple[str, str, str, int], float]


def time_alone(
    config: Config,
    plan: Plan,
    host: str,
    sizes: Iterable[int],
    *,
    input_shape: tuple[int, ...],
    classes: int,
    cores: Iterable[int] = (),
    repeats: int = 15,
) -> Alone:
    """Returns the median seconds of every function that a host runs under a plan.

    Args:
      config: Resolved configuration; model and optimiser are used.
      plan: The plan.
      host: The host's name.
      sizes: Micro-batch sizes.
      input_shape: Shape of one sample.
      classes: Number of classes.
      cores: Cores to run on; none for any.
      repeats: Timed runs of each function.

    Raises:
      RunError: The process failed.
    """
    rows = run_pinned(
        _measure,
        configuration.to_dict(config),
        plan.to_dict(),
        host,
        sorted(set(sizes)),
        tuple(input_shape),
        classes,
        repeats,
        cores=cores,
        variables={"JAX_PLATFORMS": "cpu"},
    )
    return {(first, last, kind, samples): s for first, last, kind, samples, s in rows}


def _measure(
    values: dict[str, Any],
    plan_values: dict[str, Any],
    host: str,
    sizes: list[int],
    input_shape: tuple[int, ...],
    classes: int,
    repeats: int,
) -> list[list[Any]]:
    """Runs in the pinned process, which has not loaded jax before."""
    import stages

    stages.retain_memory()  # as processes of a run do, and before jax is loaded
    from pipar_jax.runtime.setup import build_model, set_up_jax
    from pipar_jax.training import optimizer
    from pipar_jax.training.compile import LEAST_S, run_all
    from pipar_jax.training.replica import Replica

    config = configuration.from_dict(values)
    set_up_jax(config.model)
    plan = Plan.from_dict(plan_values)
    model = build_model(config, Signature.labelled(input_shape, classes))
    params, state = model.init(config.seed)
    compiled = optimizer.compiled(
        config.optimizer, steps=optimizer.MANY_STEPS, proximal_mu=config.aggregation.proximal_mu
    )
    replicas = [
        Replica(stage, params, state, compiled)
        for device, one in enumerate(plan.devices)
        for index, stage in enumerate(stages.split(model, one.cuts))
        if plan.host(device, index) == host
    ]
    run_all(model, replicas, sizes)  # compiles
    found = run_all(model, replicas, sizes, repeats=repeats, least_s=LEAST_S)
    return [[*shape.units, shape.kind, shape.samples, seconds] for shape, seconds in found.items()]
