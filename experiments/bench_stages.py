"""Training steps on CPUs against PyTorch, split against whole models, memory, compilation.

A full step (forward, backward, SGD with momentum) on CIFAR shapes, one core and two, batch 100 and
25. Ours and PyTorch's run alternately in separate processes on the same cores. For comparison, the
roofline: the step's operations at the rate of a large matrix product on the same cores. PyTorch
needs the extra ``peers``; without it only our times are measured. Networks written with Flax alone
are compared with what tracing makes of them, and with the registered ones.

  python -m experiments.bench_stages [--networks=vgg5,resnet18] [--stem=imagenet] [--cores=1]
"""

import importlib.util
import math

from absl import flags

import stages
from experiments.benchmarks import flax_networks, harness, step_times, torch_networks
from pipar_jax.errors import ConfigError
from pipar_jax.launch import plain_flags
from pipar_jax.launch.pinning import PinnedProcess, first_cores
from stages.allocator import peak_bytes

NETWORKS = plain_flags.define(
    "networks",
    ["vgg5", "vgg16", "resnet18", "resnet101", "mobilenetv3_small", "mobilenetv3_large"],
    "Networks to time.",
    plain_flags.list_of(plain_flags.one_of(torch_networks.NAMES), once=True),
)
LAYOUT = flags.DEFINE_enum(
    "torch_layout", "default", ["default", "channels_last"], "Memory layout of images in PyTorch."
)
STEM = flags.DEFINE_enum(
    "stem", "cifar", stages.STEMS, "First layers of ResNets and MobileNets; imagenet: the papers'."
)
NUMBERS = plain_flags.list_of(plain_flags.positive(int), once=True)
CORES = plain_flags.define("cores", [1, 2], "Numbers of cores to use.", NUMBERS)
BATCHES = plain_flags.define("batches", [100, 25], "Batch sizes.", NUMBERS)
CUT_NETWORK = "vgg5"
#: Steps that take longer than this are repeated less often.
SLOW_S = 4.0
#: Target ratio to PyTorch's time in each cell.
TARGET = 1.1


def compare_networks(run: harness.Bench, cores: int, batch: int, with_torch: bool) -> list[float]:
    """Times every network in one cell of the table; returns the ratios to PyTorch."""
    used, ratios, stem = first_cores(cores), [], STEM.value
    for name in run.reduced(NETWORKS, NETWORKS.value[:1]):
        cell = f"{name}, batch {batch}, {cores} core{'s' if cores > 1 else ''}"
        cell = cell if stem == "cifar" else f"{stem} stem, {cell}"
        with PinnedProcess("ours", cores=used) as ours, PinnedProcess("torch", cores=used) as peer:
            run.progress(f"{cell}: compiling")
            prepared = ours.call(step_times.prepare_jax, name, batch, stem=stem)
            # A step of a deep network takes half a minute: fewer steps, one at a time.
            slow = ours.call(step_times.run_step, 1) > SLOW_S
            steps, repeats = (1, 3) if slow else (2, 5)
            cases = {
                "ours": lambda ours=ours, steps=steps: harness.Seconds(
                    ours.call(step_times.run_step, steps)
                )
            }
            if with_torch:
                last = LAYOUT.value == "channels_last"
                peer.call(step_times.prepare_torch, name, batch, cores, last, stem)
                cases["torch"] = lambda peer=peer, steps=steps: harness.Seconds(
                    peer.call(step_times.run_step, steps)
                )
            # The C library's heap reaches its final size after some steps.
            samples = run.compare(cases, repeats=repeats, warm_up=0 if slow else 4)
            floor = ours.call(step_times.count_flops, name, batch, stem)
            floor /= ours.call(step_times.measure_rate)
            run.row(f"{cell}", samples.median("ours") * 1e3, "ms", spread=samples.spread("ours"))
            run.row(f"{cell}, roofline", floor * 1e3, "ms")
            run.row(f"{cell}, compile and first step", prepared["compile_s"], "s")
            run.row(f"{cell}, peak memory", ours.call(peak_bytes) / 1e6, "MB")
            if with_torch:
                ratio = samples.ratio("ours", "torch")
                ratios.append(ratio)
                run.row(f"{cell}, ours / PyTorch", ratio, "x", TARGET)
                memory = peer.call(peak_bytes) / 1e6
                run.row(f"{cell}, PyTorch's peak memory", memory, "MB")
    return ratios


def compare_cuts(run: harness.Bench, batch: int) -> None:
    """Times VGG-5 in two stages at each cut against the whole model, and rematerialised."""
    used = first_cores(1)
    cuts = (2,) if run.quick else (1, 2, 3, 4)
    settings = {f"cut {cut}": ((cut,), False) for cut in cuts}
    settings["cut 3, rematerialised"] = ((3,), True)
    for label, (where, again) in settings.items():
        with PinnedProcess("whole", cores=used) as whole, PinnedProcess("cut", cores=used) as cut:
            whole.call(step_times.prepare_jax, CUT_NETWORK, batch)
            facts = cut.call(step_times.prepare_jax, CUT_NETWORK, batch, where, again)
            cases = {
                "whole": lambda whole=whole: harness.Seconds(whole.call(step_times.run_step, 5)),
                "cut": lambda cut=cut: harness.Seconds(cut.call(step_times.run_step, 5)),
            }
            samples = run.compare(cases, repeats=7)
            goal = None if again else 1.05
            name = f"{CUT_NETWORK}, batch {batch}, 1 core, {label}"
            run.row(f"{name} / whole", samples.ratio("cut", "whole"), "x", goal)
            run.row(f"{name}, kept by the first stage", facts["residual_bytes"] / 1e6, "MB")


def compare_flax(run: harness.Bench, batch: int) -> None:
    """Times networks as Flax writes them: under a plain jit, traced by us, and registered."""
    goals = {"vgg5": 1.8, "resnet18": 2.5}
    used, stem = first_cores(1), STEM.value
    wanted = run.reduced(NETWORKS, NETWORKS.value[:1])
    for name in (one for one in flax_networks.NETWORKS if one in wanted):
        cell = f"{stem} stem, {name}, batch {batch}, 1 core"
        run.progress(f"{cell}, written with Flax: compiling")
        with (
            PinnedProcess("plain", cores=used) as plain,
            PinnedProcess("traced", cores=used) as traced,
            PinnedProcess("registered", cores=used) as registered,
        ):
            plain.call(step_times.prepare_flax, name, batch, stem)
            traced.call(step_times.prepare_jax, name, batch, stem=stem, traced=True)
            registered.call(step_times.prepare_jax, name, batch, stem=stem)
            processes = {"plain": plain, "traced": traced, "registered": registered}
            cases = {
                label: lambda process=process: harness.Seconds(process.call(step_times.run_step, 2))
                for label, process in processes.items()
            }
            samples = run.compare(cases, repeats=5, warm_up=2)
            run.row(f"{cell}, plain Flax", samples.median("plain") * 1e3, "ms")
            run.row(f"{cell}, traced", samples.median("traced") * 1e3, "ms")
            run.row(
                f"{cell}, plain Flax / traced", samples.ratio("plain", "traced"), "x",
                goals[name], "higher",
            )  # fmt: skip
            run.row(f"{cell}, traced / registered", samples.ratio("traced", "registered"), "x", 1.2)


def measure(run: harness.Bench) -> None:
    """Measures all cells; with --quick one network on one core.

    Raises:
      ConfigError: This process may not use as many cores.
    """
    most, there = max(CORES.value), len(first_cores(max(CORES.value)))
    if 0 < there < most:
        raise ConfigError(f"--cores={most}: this process may use {there}")
    with_torch = importlib.util.find_spec("torch") is not None
    if not with_torch:
        run.missing("PyTorch is not installed (extra `peers`): no ratios.")
    ratios: list[float] = []
    for cores in run.reduced(CORES, CORES.value[:1]):
        for batch in run.reduced(BATCHES, BATCHES.value[-1:]):
            ratios += compare_networks(run, cores, batch, with_torch)
    if ratios:
        mean = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
        run.row("geometric mean of ours / PyTorch", mean, "x", 1.0)
    if CUT_NETWORK in NETWORKS.value:
        compare_cuts(run, 25)
    compare_flax(run, BATCHES.value[0])


if __name__ == "__main__":
    harness.run(measure)
