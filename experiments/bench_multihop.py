"""Chains over compute nodes: memory, epoch time, number of hops, plans, golden values, equality.

Memory is that of a chain's largest node: a real host with real links receives the tensors of all
its devices at once. The peak size of its arrays plus XLA's largest temporary is compared with the
prediction from shapes (XLA's temporaries, which only a compiler knows, are the same figure in
both). Mini-batch 16, CIFAR-10's shapes, the first and the last unit on the devices, cuts with the
least 3W + A. Epochs are real runs in processes with every host slowed down, compared with the
simulator's prediction from times measured separately on each host.

python -m experiments.bench_multihop --profiles=FOLDER_OF_PROFILE_TABLES
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

from absl import flags

import stages
from experiments.benchmarks import chain_equality, harness, simulator_settings
from experiments.benchmarks import chain_settings as chains
from experiments.benchmarks.chain_settings import Setting
from pipar_jax.launch import launcher, plain_flags
from pipar_jax.report import RecordedRun, read_run
from pipar_jax.runtime.setup import build_model
from pipar_jax.tuner.chain_search import ChainProblem, Node, plan_chain, read_profile
from stages.signature import Signature

PARTS = ("memory", "equality", "time", "hops", "plans", "golden")
#: Parts that take longer than --quick allows.
SLOW = ("hops", "plans")
ONLY = flags.DEFINE_multi_enum("only", [], PARTS, "Measure only this; may be repeated.")
NETWORK = flags.DEFINE_enum(
    "network", None, [one.name for one in chains.NETWORKS], "Memory: measure only this network."
)
PROFILES = plain_flags.define_folder(
    "profiles", "Folder of profile tables; empty: no golden values.", exists=True
)

#: Table, layers on the nodes, nodes, and the published cost in milliseconds with its cuts.
GOLDEN = (
    ("resnet101", (2, 36), 2, 1036.923, (25,)),
    ("resnet101", (2, 36), 3, 711.461, (18, 31)),
    ("vgg19", (3, 22), 5, 747.482, None),
)
MB = 1e6


def measure_memory(run: harness.Bench) -> None:
    """Adds predicted and measured memory of the largest node, per policy, nodes and devices."""
    networks = (chains.Network("vgg5"),) if run.quick else chains.NETWORKS
    if NETWORK.value:
        networks = (chains.Network(NETWORK.value),)
    devices, most = ((2, 4), 2) if run.quick else ((4, 16), 4)
    for network in networks:
        config = chains.memory_config(network, (1, 2), 1)
        model = build_model(
            config,
            Signature.labelled(simulator_settings.INPUT_SHAPE, simulator_settings.CLASSES),
        )
        facts = stages.unit_facts(model, chains.BATCH)
        bounds, whole = network.bounds(model), dict[int, float]()
        for nodes in range(1, most + 1):
            run.progress(f"{network.name}, {nodes} nodes", nodes - 1, most)
            cuts = chains.best_cuts(facts, *bounds, nodes)
            found = chains.drive_largest(network, facts, cuts, devices)
            for (policy, count), one in found.items():
                name = f"{network.name} {nodes} nodes {count} devices {policy}"
                measured = one.arrays + one.temporary
                error = (one.predicted + one.temporary) / measured - 1.0
                alone = one.predicted / one.arrays - 1.0
                run.row(f"{name}: measured", measured / MB, "MB")
                run.row(f"{name}: prediction's error", abs(error) * 100, "%", 10.0)
                run.note(
                    f"{name}: predicted {(one.predicted + one.temporary) / MB:.0f} MB ({error:+.1%}"
                    f"; arrays alone {alone:+.1%}), temporaries {one.temporary / MB:.0f} MB, "
                    f"resident {one.resident / MB:.0f} MB, cuts {','.join(map(str, cuts))}"
                )
            if ("copy", max(devices)) not in found:
                run.note(f"{network.name} {nodes} nodes {max(devices)} devices copy: too large")
                continue
            copies = found["copy", max(devices)]
            whole[nodes] = copies.arrays + copies.temporary
        sizes = {
            nodes: max(chains.model_bytes(facts, chains.best_cuts(facts, *bounds, nodes)))
            for nodes in (1, most)
        }
        model_saves = (1.0 - sizes[most] / sizes[1]) * 100
        if not whole.keys() >= sizes.keys():
            continue
        saves = (1.0 - whole[most] / whole[1]) * 100
        name = f"{network.name}: {most} nodes with copies save"
        run.row(name, saves, "%", model_saves - 2.0, "higher")
        run.row(f"{name} by the memory model's best cuts", model_saves, "%")


def measure_equality(run: harness.Bench) -> None:
    """Adds the largest difference from centralised SGD."""
    cases = chain_equality.CASES[:2] if run.quick else chain_equality.CASES
    with tempfile.TemporaryDirectory() as folder:
        worst = chain_equality.largest_difference(cases, Path(folder))
    run.row(f"largest difference from SGD on the union, {len(cases)} chains", worst, "", 1e-9)


def train(setting: Setting, folder: Path) -> tuple[RecordedRun, float]:
    """Trains a setting; returns its run and the median seconds of a round."""
    summary = launcher.launch(setting.config(folder))
    found = read_run(Path(summary["folder"]))
    return found, statistics.median(row["seconds"] for row in found.of("round_finished")[1:])


def measure_time(run: harness.Bench, folder: Path) -> None:
    """Adds predicted and measured epochs."""
    errors = []
    settings = chains.VALIDATED[1:2] if run.quick else chains.VALIDATED
    for done, setting in enumerate(settings):
        run.progress(setting.name, done, len(settings))
        found, seconds = train(setting, folder)
        signed = (chains.predict(found) / seconds - 1.0) * 100
        errors.append(abs(signed))
        run.row(f"{setting.name}: epoch", seconds, "s")
        run.row(f"{setting.name}: prediction's error", signed, "%")
    run.row(f"mean error of {len(errors)} epochs", statistics.fmean(errors), "%", 3.0)


def compare_two(run: harness.Bench, folder: Path, title: str, one: Setting, other: Setting) -> None:
    """Adds the epochs of two settings, which alternate, and their ratio."""
    seconds: dict[Setting, list[float]] = {one: [], other: []}
    for setting in (one, other, other, one):
        run.progress(setting.name)
        found, took_s = train(setting, folder)
        if not seconds[setting]:
            run.note(f"{title}, {setting.name}: {found.plan_text}")
        seconds[setting].append(took_s)
    for setting, some in seconds.items():
        run.row(f"{title}, {setting.name}: epoch", statistics.fmean(some), "s")
    ratios = [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]
    run.row(f"{title}: ratio of the epochs", statistics.fmean(ratios), "x",
            spread=abs(ratios[0] - ratios[1]))  # fmt: skip


def measure_golden(run: harness.Bench) -> None:
    """Adds the planner's published optima and its time."""
    if not PROFILES.value:
        run.missing("golden values skipped: they need profile tables, see --profiles")
        return
    for table, layers, count, cost_ms, cuts in GOLDEN:
        path = Path(PROFILES.value) / f"{table}_cifar.csv"
        if not os.path.isfile(path):
            run.missing(f"golden values of {table} skipped: there is no {path}; see --profiles")
            continue
        profile = read_profile(path, "VM")
        problem = ChainProblem(tuple(Node(f"n{i}", profile) for i in range(count)), *layers)
        began_s = time.thread_time()
        plan = plan_chain(problem, "mpsl")
        elapsed_s = time.thread_time() - began_s
        name = f"golden {table} P={count}"
        run.row(f"{name}: difference", abs(plan.cost_s * 1e3 - cost_ms), "ms", 0.0011)
        run.row(f"{name}: planner", elapsed_s * 1e3, "ms", 10.0)
        run.note(f"{name}: {plan.cost_s * 1e3:.3f} ms, cuts {plan.cuts}, published {cuts or '-'}")


def measure(run: harness.Bench) -> None:
    """Measures all parts, or those of ``--only``."""
    wanted = run.reduced(ONLY, [part for part in PARTS if part not in SLOW]) or PARTS
    if run.quick and not set(SLOW).intersection(wanted):
        run.missing(f"{' and '.join(SLOW)} skipped: they take longer than --quick allows")
    if "golden" in wanted:
        measure_golden(run)
    if "equality" in wanted:
        measure_equality(run)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for batch in chains.BATCHES.values():
            simulator_settings.write_data(folder, batch)
        if "time" in wanted:
            measure_time(run, folder)
        if "hops" in wanted:
            compare_two(run, folder, "three nodes against one of the same cost",
                        chains.MULTIHOP, chains.ONE_HOP)  # fmt: skip
        if "plans" in wanted:
            for ours, papers in zip(chains.OURS, chains.PAPERS, strict=True):
                title = f"our plan against the paper's objective, links {ours.link}"
                compare_two(run, folder, title, ours, papers)
    if "memory" in wanted:
        measure_memory(run)


if __name__ == "__main__":
    harness.run(measure)
