"""Prints the units and stages of a model: shapes, parameters, bytes, operations.

  pipar describe --config=cifar10_vgg5 --config.pipeline.cut=2

Nothing is computed. Bytes are for one micro-batch of the configuration: the activation that crosses
a cut (its cotangent has the same size), and the residuals that a stage keeps for its backward pass.
--dependence=256 computes, on samples of the test set, how much each unit's output reveals of the
input: the squared distance correlation, bias-corrected, without clipping and noise.
"""

import dataclasses
import pathlib

import numpy as np
from rich.table import Table

import configs
import stages
from pipar_jax import data
from pipar_jax.config import AUTO, Config
from pipar_jax.config.codec_candidates import candidates_of
from pipar_jax.config.schema import option
from pipar_jax.config.texts import split_list, whole_numbers
from pipar_jax.data.partition import spread
from pipar_jax.data.types import computed
from pipar_jax.errors import ConfigError, DataError
from pipar_jax.launch import flags
from pipar_jax.launch.binary import wrong_use
from pipar_jax.methods.registry import METHODS, uses_nodes
from pipar_jax.privacy.leakage import FEWEST_SAMPLES, distance_correlation
from pipar_jax.report.console import make_console
from pipar_jax.roles.participants import make_loader
from pipar_jax.roles.start_weights import first_variables
from pipar_jax.runtime.interception import activations
from pipar_jax.runtime.setup import build_model, set_up_jax
from pipar_jax.schedule.plan import device_name
from stages.signature import Signature

# Shapes and classes of the public data sets, so that nothing has to be downloaded.
SHAPES = {
    "digits": ((8, 8, 1), 10),
    "mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "svhn_cropped": ((32, 32, 3), 10),
}


@dataclasses.dataclass
class DescribeFlags:
    """Flags of this binary."""

    stages: str = option("", "cuts to describe, such as 2,5; empty: those of the configuration")
    dependence: int = option(
        0,
        "test samples on which the distance correlation of inputs and activations is computed, at "
        "least 4; 0: not computed",
        at_least=0,
        at_most=256,
    )


def resolve_cuts(config: Config, model: stages.Model, wanted: str) -> tuple[int, ...]:
    """Returns the cuts to describe; none if the configured method does not cut.

    Args:
      config: Resolved configuration.
      model: The model.
      wanted: Cuts by position or unit; empty: those of the configuration. Where its cuts are the
        planner's to find, that of pipeline.cut.

    Raises:
      ConfigError: A cut is neither a position between two units nor the name of a unit.
    """
    method, pipeline = METHODS.get(config.method), config.pipeline
    field, text = "--stages", wanted
    if not wanted:
        if method is not None and not method.cuts:
            return ()
        field, text = "pipeline.cut", str(pipeline.cut)
        if pipeline.cuts and uses_nodes(config.method):
            field, text = "pipeline.cuts", pipeline.cuts
    names = list(model.unit_names)
    try:
        cuts = tuple(names.index(t) + 1 if t in names else int(t) for t in split_list(text))
        stages.split(model, cuts)
    except (ValueError, stages.StageError) as error:
        raise ConfigError(
            f"{field}={text}: {error}; name units of {names} or positions between them"
        ) from error
    return cuts


def measure_dependence(
    config: Config, model: stages.Model, dataset: data.Dataset, wanted: int
) -> list[float]:
    """Returns the distance correlation of the input and each unit's output.

    Args:
      config: Resolved configuration.
      model: The model.
      dataset: The test set.
      wanted: Samples, at most.

    Raises:
      ConfigError: There are too few samples, or inputs are not numbers with distances.
      RunError: The weights that the configuration names cannot be read.
    """
    chosen = dataset.at_full_length(dataset.test.take(spread(len(dataset.test), wanted)))
    if len(chosen) < FEWEST_SAMPLES:
        raise ConfigError(
            f"--dependence={wanted} with {len(dataset.test)} test samples: a distance correlation "
            f"needs {FEWEST_SAMPLES}"
        )
    dtype = config.model.weight_dtype
    x = computed(dataset.normalise(chosen.x), dtype)
    if x.dtype.kind != "f":
        raise ConfigError(
            f"inputs of {config.data.source} are {x.dtype}: such as tokens have no distances, so "
            "leave --dependence out"
        )
    sides = {name: computed(one, dtype) for name, one in chosen.sides.items()}
    outputs = activations(model, *first_variables(model, config), x, sides)
    return [distance_correlation(x, y.astype(np.float64)) for y in outputs]


def make_table(
    title: str,
    rows: tuple[stages.Facts, ...],
    cuts: tuple[int, ...],
    dependence: list[float] | None = None,
) -> Table:
    """Returns a table of units or stages, with a rule at each cut.

    Args:
      title: Its title.
      rows: The units or stages.
      cuts: Positions behind which a rule is drawn.
      dependence: The distance correlation of each row, a further column.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("units")
    for name in ("parameters", "output", "cut, KB", "kept, KB", "forward, MFLOP", "backward"):
        table.add_column(name, justify="right")
    if dependence is not None:
        table.add_column("dependence", justify="right")
    for index, row in enumerate(rows, start=1):
        label = row.units[0] if len(row.units) == 1 else f"{row.units[0]} … {row.units[-1]}"
        table.add_row(
            label,
            f"{row.parameters:,}",
            "x".join(map(str, row.output_shape[1:])),
            f"{row.output_bytes / 1e3:,.1f}",
            f"{row.residual_bytes / 1e3:,.1f}",
            f"{row.forward_flops / 1e6:,.1f}",
            f"{row.backward_flops / 1e6:,.1f}",
            *([] if dependence is None else [f"{dependence[index - 1]:.3f}"]),
            end_section=index in cuts,
        )
    return table


def make_obstacles(model: stages.Model) -> Table:
    """Lays out where a traced model has no cut, and why."""
    table = Table(title="no cut", title_justify="left")
    table.add_column("behind")
    table.add_column("because")
    for obstacle in model.obstacles:
        table.add_row(obstacle.after, obstacle.reason)
    return table


def make_sides(model: stages.Model) -> Table:
    """Lays out the side inputs of a model, and the units that take them."""
    table = Table(title="side inputs", title_justify="left")
    table.add_column("name")
    table.add_column("of a sample")
    table.add_column("taken by")
    for name, kind in model.signature.sides.items():
        takers = [unit.name for unit in model.units if name in unit.sides]
        table.add_row(name, str(kind), ", ".join(takers))
    return table


def make_lengths(config: Config) -> Table:
    """Lays out to what the mini-batches of each device are padded in the first epoch.

    Below it is why they are not known of the first device whose data cannot be read here.

    Args:
      config: Resolved configuration.
    """
    lengths = whole_numbers(config.data.pad_to)
    table = Table(
        title="mini-batches by padded length", title_justify="left", caption_justify="left"
    )
    table.add_column("device")
    for length in lengths:
        table.add_column(str(length), justify="right")
    for index in range(config.devices.total):
        try:
            dataset = data.load_device(config, index)
        except DataError as error:  # a device's data may be on its own machine alone
            table.add_row(device_name(index), *["-"] * len(lengths))
            table.caption = table.caption or f"{device_name(index)}: {error}"
            continue
        steps = make_loader(config.data, config.seed, index, dataset).steps_by_length()
        table.add_row(device_name(index), *(str(steps.get(length, 0)) for length in lengths))
    return table


def main(config: Config, own: DescribeFlags) -> None:
    """Describes the configured model."""
    known = SHAPES.get(config.data.source)
    with wrong_use():
        dataset = data.load_server(config) if own.dependence or known is None else None
    signature = (
        dataset.signature(config.model.weight_dtype)
        if dataset is not None
        else Signature.labelled(*SHAPES[config.data.source])
    )
    set_up_jax(config.model)
    try:
        with wrong_use():
            model = build_model(config, signature)
    except stages.StageError as error:  # of the network that the command line names
        raise ConfigError(str(error)) from error
    cuts = resolve_cuts(config, model, own.stages)
    pipelined = config.method in METHODS and METHODS[config.method].pipelined
    parts = config.pipeline.micro_batches if pipelined else 1
    batch = -(-config.data.batch_size // parts)
    console = make_console(110)
    title = f"{model.name}, {stages.parameter_count(model):,} parameters, micro-batch {batch}"
    dependence = None
    if own.dependence and dataset is not None:
        dependence = measure_dependence(config, model, dataset, own.dependence)
    console.print(make_table(title, stages.unit_facts(model, batch), cuts, dependence))
    if config.method == AUTO and (words := candidates_of(config, model.name).words()):
        console.print(f"codecs: {words}")
    if model.sides:
        console.print(make_sides(model))
    if model.lengths:
        console.print(make_lengths(config))
    if model.obstacles:
        console.print(make_obstacles(model))
    facts = stages.stage_facts(model, cuts, batch)
    title = f"stages of cuts {', '.join(map(str, cuts))}" if cuts else "one stage, no cut"
    console.print(make_table(title, facts, ()))


if __name__ == "__main__":
    flags.run(
        main,
        DescribeFlags,
        doc=__doc__,
        name="describe",
        presets=pathlib.Path(configs.__file__).parent,
    )
