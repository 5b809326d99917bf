"""Compilation for the next plan, on its own thread, while the present plan trains."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Sequence

from pipar_jax.aggregation.aggregator import Aggregator
from pipar_jax.config import Config
from pipar_jax.methods.registry import hosts_of
from pipar_jax.runtime import memory, migration, undo
from pipar_jax.runtime.priority import lower_priority
from pipar_jax.runtime.ragged import MicroBatchSizes
from pipar_jax.schedule.plan import Plan, WeightPolicy
from pipar_jax.training.compile import run_all
from pipar_jax.training.optimizer import CompiledOptimizer
from stages import Model


class BackgroundCompiler:
    """A thread that compiles plans in sequence; it starts with the first plan.

    Args:
      name: Host's name, for the thread's.
      compile: Compiles a plan's stages and returns why the host refuses it, or None; runs on the
        thread.
      done: Called with each plan's number and the result of ``compile``.
      failed: Called with an exception of the thread.
    """

    def __init__(
        self,
        name: str,
        compile: Callable[[Plan], str | None],
        done: Callable[[int, str | None], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._name, self._compile, self._done, self._failed = name, compile, done, failed
        self._queue: queue.SimpleQueue[tuple[int, Plan] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, number: int, plan: Plan) -> None:
        """Queues a plan for compilation and returns at once."""
        if self._thread is None:
            name = f"pipar-ahead-{self._name}"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()
        self._queue.put((number, plan))

    def close(self) -> None:
        """Ends the thread; waits for a compilation in progress."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        lower_priority()
        try:
            while (item := self._queue.get()) is not None:
                number, plan = item
                self._done(number, self._compile(plan))
        except BaseException as error:  # handed to whoever joins the host
            self._failed(error)


def compile_plan(
    model: Model,
    plan: Plan,
    host: str,
    config: Config,
    samples: Sequence[int],
    sizes: MicroBatchSizes,
    compiled: CompiledOptimizer,
    *,
    rematerialise: bool,
    releases: migration.Released | None,
    between: Callable[[], None],
) -> str | None:
    """Compiles a host's stages under a plan, and the averages that it computes.

    Args:
      model: The whole model.
      plan: The plan.
      host: The host's name.
      config: Resolved configuration.
      samples: Samples that each device trains on in an epoch.
      sizes: Sizes of the host's micro-batches under the plan.
      compiled: The optimiser.
      rematerialise: Whether the host's stages compute forward passes again.
      releases: On a device of a private run what of its stages is released under a plan.
      between: Called between stages, to detect that they are no longer wanted.

    Returns:
      Why the host refuses the plan, if its memory limit is exceeded; else None.
    """
    hosts = hosts_of(config)
    limit_mb = hosts[host].memory_mb
    local = {model.unit_names[unit] for unit in plan.local_units(host, len(model.units))}
    temporary = 0
    keeps = functools.partial(undo.find_keep, hosts, config.cohort, plan)
    for replica in migration.samples_of(
        model, plan, host, compiled, keeps, rematerialise=rematerialise, releases=releases
    ):
        sizes.told([replica])
        run_all(model, [replica], sizes.computed, between=between)
        if not sizes.confirm([replica]):  # the stages before it need the smaller sizes, too
            return compile_plan(
                model, plan, host, config, samples, sizes, compiled,
                rematerialise=rematerialise, releases=releases, between=between,
            )  # fmt: skip
        if plan.weights == WeightPolicy.COPY and local.issuperset(replica.params):
            average = Aggregator(config.aggregation, replica.params, replica.state)
            average.compile()
        if limit_mb:
            temporary = max(temporary, memory.temporary_bytes(model, [replica], sizes.computed))
    if not limit_mb:
        return None
    need = memory.predict(model, plan, host, config, samples)
    return memory.memory_excess(need, temporary, hosts, host, plan)
