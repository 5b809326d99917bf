"""What tasks and models beyond image classification cost.

--part=lora: bytes of a round and memory of each host for GPT-2 small, fine-tuned by adapters or
with all weights, split or federated; from shapes, in seconds.
--part=overhead: an epoch of VGG-5 whose last stage has its loss from the task layer, against the
same stage with its loss in a line of optax; a minute.

python -m experiments.bench_tasks --part=lora
"""

from absl import flags

from experiments.benchmarks import fine_tuning, harness, task_overhead
from stages import retain_memory

PARTS = ("lora", "overhead")
PART = flags.DEFINE_multi_enum("part", PARTS, PARTS, "What to measure; may be repeated.")


def lora(run: harness.Bench) -> None:
    """Adds rows of bytes and memory, and the ratios of adapters to weights."""
    made = fine_tuning
    run.note(
        f"GPT-2 small, vocabulary {made.VOCABULARY}, {made.LENGTH} tokens, batch {made.BATCH}, "
        f"{made.STEPS} steps a round, AdamW, {made.DEVICES} devices with the embedding and "
        f"{made.CUT - 1} blocks each"
    )
    run.note(
        "memory without XLA's temporaries, among which is what a last stage keeps of its forward: "
        "where FL trains the whole model, and on the server, the figures are lower bounds"
    )
    run.note(
        "all weights include the head's copy of the token table, which is trained apart from it; "
        "adapters' ratios to the whole model leave it out"
    )
    for way in made.WAYS:
        run.progress(way.name)
        cost = made.cost(way)
        run.row(f"{way.name}: weights of a device in a round", cost.averaged / 1e6, "MB")
        run.row(f"{way.name}: activations of a device in a round", cost.activations / 1e6, "MB")
        run.row(f"{way.name}: memory of a device", cost.device / 1e6, "MB")
        run.row(f"{way.name}: memory of the server", cost.server / 1e6, "MB")
    for rank, of_part, of_whole in made.ratios():
        run.row(f"rank {rank}: adapters / device's part", 100 * of_part, "%")
        run.row(f"rank {rank}: adapters / whole model", 100 * of_whole, "%")


def overhead(run: harness.Bench) -> None:
    """Adds the seconds of an epoch by the task layer and without it, and their ratio."""
    retain_memory()
    batch, steps = 100, 5 if run.quick else 10
    run.progress("compiling")
    ways = {name: task_overhead.Training(name, batch, steps) for name in ("direct", "task")}
    samples = run.compare({name: way.epoch for name, way in ways.items()}, repeats=15)
    cell = f"{task_overhead.NETWORK}, {steps} steps of {batch}"
    for name in ways:
        run.row(f"{cell}, {name}, minimum", samples.minimum(name) * 1e3, "ms",
                spread=samples.spread(name))  # fmt: skip
    ratio = samples.minimum("task") / samples.minimum("direct")
    run.row(f"{cell}, minimum of task / direct", ratio, "x", 1.01)
    run.row(f"{cell}, median of neighbours' task / direct", samples.ratio("task", "direct"), "x")


def measure(run: harness.Bench) -> None:
    """Measures the selected parts."""
    if "lora" in PART.value:
        lora(run)
    if "overhead" in PART.value:
        overhead(run)


if __name__ == "__main__":
    harness.run(measure)
