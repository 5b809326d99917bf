"""Data sets, their parts, and the mini-batches that a device trains on. numpy only, no jax.

A public set is decoded once per machine and memory-mapped; each device copies only its own part. A
device's own data are read by that device and never leave it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipar_jax.config import Config, DataConfig, Hosts
from pipar_jax.config.plugins import is_own
from pipar_jax.config.tasks import make_task
from pipar_jax.data.admission import admit, admit_device, with_tests
from pipar_jax.data.agreement import check_alike, check_fits
from pipar_jax.data.loader import Loader, Prefetcher, steps_per_epoch
from pipar_jax.data.own import load_own
from pipar_jax.data.partition import partition, partition_table, spread
from pipar_jax.data.public import load_public
from pipar_jax.data.published import PUBLIC_SOURCES
from pipar_jax.data.queries import make_queries
from pipar_jax.data.types import ArrayOrDict, Dataset, Examples, normalise
from pipar_jax.errors import DataError
from stages.tasks.targets import AnyTargets, TargetRule

__all__ = [
    "ArrayOrDict",
    "Dataset",
    "Examples",
    "Loader",
    "Prefetcher",
    "admit",
    "admit_device",
    "check_alike",
    "check_fits",
    "load",
    "load_device",
    "load_server",
    "make_queries",
    "normalise",
    "partition",
    "partition_table",
    "prepare",
    "steps_per_epoch",
    "table",
]


def load(config: DataConfig) -> Dataset:
    """Returns a public data set, both splits memory-mapped and cut to the configured samples.

    Raises:
      DataError: The source is the user's own data, or cannot be read.
    """
    if config.source not in PUBLIC_SOURCES:
        raise DataError(
            f"data.source={config.source!r} is not a public data set: load the data of a device "
            "with load_device, the test set with load_server"
        )
    whole = load_public(config.source, config)
    return dataclasses.replace(
        whole,
        train=_cut(whole.train, config.train_samples),
        test=_cut(whole.test, config.test_samples),
    )


def load_device(config: Config, index: int, rule: TargetRule | None = None) -> Dataset:
    """Returns the training data of a device: its part of a public set, or its own data.

    Only the device's samples are in memory; the test split is empty, unless devices evaluate.

    Args:
      config: Resolved configuration.
      index: The device.
      rule: What the task needs targets to be; None: as configured.

    Raises:
      DataError: The data cannot be read or dealt.
    """
    source = Hosts(config, nodes=0).device(index).data_source
    rule = rule or make_task(config.task).targets
    if source not in PUBLIC_SOURCES:
        train = load_own(source, index, config.data, part="train", rule=rule)
        if config.run.evaluate_on == "server":
            return train
        test = load_own(source, index, config.data, part="test", rule=rule)
        return with_tests(train, test, repr(source))
    _check_no_tests(config)
    _check_classes_wanted(rule, config)
    whole = load_public(source, config.data)
    mine = whole.train.take(_deal(whole, config)[index])
    return dataclasses.replace(whole, train=mine, test=whole.test.empty())


def load_server(config: Config, rule: TargetRule | None = None) -> Dataset:
    """Returns the coordinator's test set; its training split is empty.

    Args:
      config: Resolved configuration.
      rule: What the task needs targets to be; None: as configured.

    Raises:
      DataError: The test set cannot be read.
    """
    data = config.data
    rule = rule or make_task(config.task).targets
    if data.source not in PUBLIC_SOURCES:
        return load_own(data.test_source or data.source, None, data, part="test", rule=rule)
    _check_classes_wanted(rule, config)
    whole = load_public(data.source, data)
    test = _cut(whole.test, data.test_samples)
    return dataclasses.replace(whole, train=whole.train.empty(), test=test)


def table(config: Config) -> str:
    """Returns a table of the samples of each device by class; empty for own data.

    Raises:
      DataError: The data cannot be read or dealt.
    """
    if config.data.source not in PUBLIC_SOURCES:
        return ""
    whole = load_public(config.data.source, config.data)
    return partition_table(whole.train.labels, _deal(whole, config), whole.classes)


def prepare(config: Config) -> None:
    """Decodes a public set, or reads the files of own data, before any process starts.

    Functions (``module:``) are not called; the processes of their hosts call them.

    Raises:
      DataError: Data are missing or not valid; reported once for all hosts of this machine.
    """
    # What a task of the user's own needs of targets is not known here, nor what it leaves out.
    own = is_own(config.task.name)
    rule = AnyTargets(padding=math.nan) if own else make_task(config.task).targets
    if config.data.source in PUBLIC_SOURCES:
        _check_no_tests(config)
        _check_classes_wanted(rule, config)
        load_public(config.data.source, config.data)
        return
    check_alike(_files(config, rule))


def _check_no_tests(config: Config) -> None:
    """Checks that devices are not to evaluate test data that they do not have.

    Raises:
      DataError: They are.
    """
    if config.run.evaluate_on != "server":
        raise DataError(
            f"run.evaluate_on={config.run.evaluate_on!r} needs test data of the devices' own, but "
            f"data.source={config.data.source!r} has one test set, which the server evaluates: "
            "give own data with x_test and y_test for every device, or set run.evaluate_on=server"
        )


def _check_classes_wanted(rule: TargetRule, config: Config) -> None:
    """Checks that the task takes the targets of a public data set.

    Raises:
      DataError: It needs others than classes.
    """
    if not (rule.counts_classes or rule.takes_dict):
        raise DataError(
            f"task.name={config.task.name!r} does not fit data.source={config.data.source!r}, "
            "whose targets are classes: give data of your own (npz:PATH, module:NAME:FUNCTION), or "
            "set task.name=classification or a task of your own"
        )


def _files(config: Config, rule: TargetRule) -> Iterator[tuple[str, Dataset]]:
    """Yields the hosts whose own data are files, with their data, the server first."""
    if (config.data.test_source or config.data.source).startswith(("npz:", "npy:")):
        yield "server", load_server(config, rule)
    hosts = Hosts(config, nodes=0)
    for name in hosts.expected:
        if hosts[name].data_source.startswith(("npz:", "npy:")):
            yield name, load_device(config, hosts[name].index, rule)


def _deal(whole: Dataset, config: Config) -> list[NDArray[np.intp]]:
    """Returns each device's positions in the whole training split."""
    kept = spread(len(whole.train), config.data.train_samples)
    labels = whole.train.labels[kept]
    parts = partition(labels, config.devices.count, config.data, config.seed)
    return [kept[part] for part in parts]


def _cut(split: Examples, wanted: int) -> Examples:
    kept = spread(len(split), wanted)
    return split if len(kept) == len(split) else split.take(kept)
