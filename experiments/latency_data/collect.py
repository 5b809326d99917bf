"""Collects times of layers on many kinds of devices, all emulated on this machine.

A process for each set of compiler options and cores keeps its programs and is timed under several
conditions: stopped for half of the time, moved to a single core. Devices that differ by more than a
factor are emulated by compiler options: narrower vectors, no XLA optimisations, no fast library for
products, no choice of formulations in ``stages.layers``. Layers are those of the registered
networks and of chains drawn at random, half of them of depthwise and squeezed blocks alone.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.latency_data.drawn_chains import random_chain, separable_chain
from pipar_jax.launch.pinning import PinnedProcess, first_cores

#: Batch sizes of layers of the registered networks.
SIZES = (25,)
#: Batch sizes of which two are drawn for each layer of a random chain.
DRAWN_SIZES = (2, 4, 8, 16, 32, 64, 100)
NETWORKS = ("vgg5", "vgg11", "resnet18", "mobilenetv3_small", "cnn", "mlp", "vit_small")
#: Chains drawn at random, by the beginning of their names: of all kinds of blocks, and of inverted
#: residuals with depthwise and squeezed layers, of which registered networks have few kinds.
CHAINS = {"chain": 6, "separable": 6}
#: Period of stopping and continuing a process. The kernel checks a busy thread once per tick (4
#: ms), so that a shorter period would not stop long computations.
PERIOD_S = 0.02
#: Minimum number of periods of timing a function, since it starts and ends anywhere in them.
PERIODS = 20


class Layer(NamedTuple):
    """One layer at one micro-batch size.

    Attributes:
      network: A registered network, ``reference``, or a key of CHAINS and a seed.
      unit: Its position in it.
      batch: Samples.
    """

    network: str
    unit: int
    batch: int


class Condition(NamedTuple):
    """The condition under which a process is timed.

    Attributes:
      name: Suffix of the device's name.
      family: Family of similar devices, which are held out together.
      duty: Share of the time for which the process runs.
      core: Core to which it is moved; None leaves it.
    """

    name: str
    family: str
    duty: float = 1.0
    core: int | None = None


class Variant(NamedTuple):
    """A process with its own programs.

    Attributes:
      name: Prefix of the devices' names.
      cores: Number of cores.
      flags: XLA's flags.
      platform: Platform of jax.
      stock: Whether layers use only XLA's own operations.
      conditions: Conditions of timing.
    """

    name: str
    cores: int
    flags: str
    platform: str
    stock: bool
    conditions: tuple[Condition, ...]


def variants(gpu: bool = False) -> tuple[Variant, ...]:
    """Returns the variants that this machine supports.

    Args:
      gpu: Whether jax finds a GPU here.
    """
    cores = len(first_cores(1 << 16)) or (os.cpu_count() or 1)
    scalar = "--xla_backend_optimization_level=0"
    library = "--xla_cpu_experimental_ynn_fusion_type="

    def one(name: str, flags: str, family: str = "", *, stock: bool = False) -> Variant:
        return Variant(name, 1, flags, "cpu", stock, (Condition("plain", family or name),))

    found = [
        Variant(
            "core", 1, "", "cpu", False,
            (Condition("plain", "native"), Condition("half", "native", duty=0.5)),
        ),
        one("scalar", scalar), one("library", library), one("stock", "", stock=True),
    ]  # fmt: skip
    if platform.machine() in ("x86_64", "AMD64"):  # other processors have a single vector width
        # Most of the time is spent in the library for products, which ignores these options.
        found.append(one("narrow", "--xla_cpu_max_isa=SSE4_2", "native"))
    if cores > 1:
        alone = Condition("one", "multicore", core=0)
        found.append(
            Variant("cores", 2, "", "cpu", False, (Condition("plain", "multicore"), alone))
        )
        found.append(Variant("scalars", 2, scalar, "cpu", False, (Condition("plain", "scalar"),)))
    if gpu:
        found.append(Variant("gpu", 1, "", "cuda", True, (Condition("plain", "gpu"),)))
    return tuple(found)


def layers(quick: bool = False) -> list[Layer]:
    """Returns the layers to time; equal layers occur once.

    Args:
      quick: Whether to return only a few.
    """
    from pipar_jax.profiling.predictor.reference import BATCH, reference_model

    found = [Layer("reference", i, BATCH) for i in range(len(reference_model().units) - 1)]
    rng = np.random.default_rng(0)
    drawn = [f"{kind}{seed}" for kind, count in CHAINS.items() for seed in range(count)]
    for name in ["mlp", "chain0", "separable0"] if quick else [*NETWORKS, *drawn]:
        model = build(name)
        seen = set()
        for index in range(len(model.units) - 1):
            likeness = str(model.shapes(1)[index]), str(model.units[index].graph), index == 0
            if likeness in seen and name in drawn:
                continue
            two = rng.choice(DRAWN_SIZES, 2, replace=False).tolist()
            sizes = two if name in drawn else SIZES
            if likeness not in seen:
                found += [Layer(name, index, int(size)) for size in sorted(sizes)]
            seen.add(likeness)
    return found


def build(name: str) -> Any:
    """Returns a registered network for CIFAR's shape, the reference layers or a random chain."""
    import stages
    from pipar_jax.profiling.predictor.reference import reference_model

    if name == "reference":
        return reference_model()
    if name.startswith("chain"):
        return random_chain(int(name.removeprefix("chain")))
    if name.startswith("separable"):
        return separable_chain(int(name.removeprefix("separable")))
    return stages.build(name, input_shape=(32, 32, 3), classes=10)


class Gathered(NamedTuple):
    """The times of one process.

    Attributes:
      devices: Name and family of each condition.
      forward_s: Seconds of forwards, [devices, layers].
      backward_s: Seconds of backwards, [devices, layers].
      update_s: Seconds of updates, [devices, layers].
    """

    devices: list[tuple[str, str]]
    forward_s: Any
    backward_s: Any
    update_s: Any


def gather(
    variant: Variant,
    wanted: Sequence[Layer],
    *,
    repeats: int = 3,
    least_s: float = 0.012,
    compile_only: bool = False,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Gathered:
    """Times layers in a separate process under each of a variant's conditions.

    Args:
      variant: The process.
      wanted: The layers.
      repeats: Minimum number of runs of each function.
      least_s: Minimum duration of each.
      compile_only: Whether to fill only the compilation cache; times are meaningless then.
      tell: Called with the number of finished layers and the total number.
    """
    conditions = (Condition("plain", ""),) if compile_only else variant.conditions
    shape = len(conditions), len(wanted)
    tables = [np.full(shape, np.nan) for _ in range(3)]
    cores = first_cores(1 << 16)
    variables = {"JAX_PLATFORMS": variant.platform, "XLA_FLAGS": variant.flags}
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            PinnedProcess(variant.name, cores=cores[: variant.cores], variables=variables)
        )
        pid = process.call(_begin, variant.stock)
        for column, layer in enumerate(wanted):
            process.call(_prepare, layer)
            for row, condition in enumerate(conditions):
                if compile_only:
                    continue
                if condition.core is not None:
                    _move(pid, {cores[condition.core]})
                with _stuttering(pid, condition.duty):
                    long = max(least_s, PERIODS * PERIOD_S) if condition.duty < 1 else least_s
                    times = process.call(_time, repeats, long, condition.duty < 1)
                if condition.core is not None:
                    _move(pid, set(cores[: variant.cores]))
                for table, seconds in zip(tables, times, strict=True):
                    table[row, column] = seconds
            tell(column + 1, len(wanted))
    devices = [(f"{variant.name}-{one.name}", one.family) for one in conditions]
    return Gathered(devices, *tables)


_STATE: dict[str, Any] = {}


def _begin(stock: bool) -> int:
    """Sets the process up as a host of a run, its compiled programs kept on disk."""
    import stages

    stages.retain_memory()
    import jax

    from pipar_jax.data.cache import user_cache

    update: Any = jax.config.update
    update("jax_compilation_cache_dir", str(user_cache() / "latency"))
    update("jax_persistent_cache_min_compile_time_secs", 0.0)
    update("jax_persistent_cache_min_entry_size_bytes", -1)
    _STATE["stock"] = stock
    return os.getpid()


def _prepare(layer: Layer) -> None:
    """Compiles a layer's functions."""
    import stages
    from pipar_jax.config import OptimizerConfig
    from pipar_jax.training import optimizer
    from pipar_jax.training.compile import run_all
    from pipar_jax.training.replica import Replica
    from stages.layers.formulation import Formulation, forced

    if _STATE.get("network") != layer.network:
        model = build(layer.network)
        _STATE.update(network=layer.network, model=model, variables=model.init(0))
        _STATE["parts"] = stages.split(model, tuple(range(1, len(model.units))))
        _STATE["compiled"] = optimizer.compiled(
            OptimizerConfig(), steps=optimizer.MANY_STEPS, proximal_mu=0.0
        )
    part = _STATE["parts"][layer.unit]
    params, state = _STATE["variables"]
    replica = Replica(part, params, state, _STATE["compiled"])
    _STATE.update(replica=replica, batch=layer.batch)
    with forced(Formulation.XLA if _STATE["stock"] else None):
        run_all(_STATE["model"], [replica], (layer.batch,))


def _time(repeats: int, least_s: float, mean: bool) -> tuple[float, float, float]:
    """Returns seconds of the prepared layer's forward, backward and update."""
    from pipar_jax.schedule.actions import BACKWARD, FORWARD, UPDATE
    from pipar_jax.training.compile import run_all

    # Other work only increases times, so that the minimum of a few runs is the device's own. A
    # process that is stopped periodically has no typical run; its mean is that of training.
    found = run_all(
        _STATE["model"], [_STATE["replica"]], (_STATE["batch"],), repeats=repeats, least_s=least_s,
        summary=statistics.fmean if mean else min,
    )  # fmt: skip
    times = {shape.kind: seconds for shape, seconds in found.items()}
    return times[FORWARD], times[BACKWARD], times[UPDATE]


def _move(pid: int, cores: set[int]) -> None:
    """Moves all threads of a process to some cores."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(ProcessLookupError):  # a thread may end meanwhile
            os.sched_setaffinity(int(thread), cores)


@contextlib.contextmanager
def _stuttering(pid: int, duty: float) -> Iterator[None]:
    """Makes a process run only for a share of each period."""
    if duty >= 1:
        yield
        return
    over = threading.Event()

    def stutter() -> None:
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(PERIOD_S * (1 - duty))
            os.kill(pid, signal.SIGCONT)
            over.wait(PERIOD_S * duty)

    thread = threading.Thread(target=stutter, name="pipar-stutter")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
