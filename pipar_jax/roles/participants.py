"""What a process of a device or of a compute node runs: it takes part until the run is over."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from pipar_jax import data as datasets
from pipar_jax.config import Config, DataConfig, NetworkConfig
from pipar_jax.config.checkpoints import state_folders
from pipar_jax.config.texts import whole_numbers
from pipar_jax.data import Dataset, Loader
from pipar_jax.data.augmentation import find_augmentation
from pipar_jax.errors import DiskError, PiparError
from pipar_jax.protocol.messages import JoinDevice, JoinNode
from pipar_jax.roles.admission import device_join, node_join
from pipar_jax.roles.federated_evaluation import LocalEvaluation
from pipar_jax.roles.rejoin import persist
from pipar_jax.roles.worker import Worker
from pipar_jax.runtime.personal import PersonalWeights
from pipar_jax.runtime.releases import Releases
from pipar_jax.runtime.setup import fit, set_up_jax, target_rule
from pipar_jax.schedule.plan import device_name, node_name
from stages import Model


def run_device(
    config: Config,
    index: int,
    address: tuple[str, int],
    *,
    model: Model | None = None,
    data: Dataset | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Takes part in a run as a device, until the coordinator ends it.

    Args:
      config: Resolved configuration.
      index: The device's index.
      address: The coordinator's host and port.
      model: The model, if not the configured one.
      data: The device's samples (its training split), if not the configured ones.
      stop: Ends the role when set.

    Raises:
      DataError: The device's data cannot be read, are wrong, or do not fit the model.
      JoinError: The coordinator cannot be reached or refuses this device.
      PeerError: The coordinator was lost or ended the run because of another host.
      RunError: This device failed.
    """
    set_up_jax(config.model)
    name = device_name(index)
    rule, tested = target_rule(config, model), config.run.evaluate_on != "server"
    dataset = (
        datasets.load_device(config, index, rule)
        if data is None
        else datasets.admit_device(
            data,
            name,
            rule,
            config.data.classes,
            tests=tested,
            pad_to=whole_numbers(config.data.pad_to),
        )
    )
    network = fit(config, model, dataset, name)
    personal = PersonalWeights(network, config.seed) if config.aggregation.personal else None
    tests = None
    if tested:
        tests = LocalEvaluation(network, dataset, config.model.weight_dtype, personal)
    releases = Releases(config, name) if config.privacy.on else None
    keyed = None
    if releases is not None:
        dataset, keyed = releases.protect(dataset)
    loader = make_loader(config.data, config.seed, index, dataset)
    if releases is not None:
        releases.expect(loader.samples_per_epoch)
    new = device_join(config, name, loader, network, keyed)
    stop = stop or threading.Event()

    def join() -> JoinDevice:
        if releases is None:
            return new
        # Its ledger may have grown since it joined last.
        return dataclasses.replace(new, spent=releases.spent, epsilon=releases.epsilon)

    def take_part(timeout_s: float) -> None:
        worker = Worker(config, name, network, loader, stop, releases, tests, personal)
        _take_part(worker, address, join, timeout_s)

    folder = state_folders(config.name, config.run, name)[0]
    try:
        with _keeping(personal, folder, name):
            _persist(config.network, take_part, stop)
    finally:
        if releases is not None:
            releases.close()


@contextlib.contextmanager
def _keeping(personal: PersonalWeights | None, folder: Path, name: str) -> Iterator[None]:
    """Writes a device's personal weights when it has taken part, however that ends.

    Raises:
      DiskError: They cannot be written, after a run that ended well.
    """
    if personal is None:
        yield
        return
    try:
        yield
    except BaseException:
        with contextlib.suppress(DiskError):  # what has ended the run is the one to report
            personal.save(folder, name)
        raise
    personal.save(folder, name)


def run_node(
    config: Config,
    index: int,
    address: tuple[str, int],
    *,
    model: Model | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Takes part in a run as a compute node, until the coordinator ends it.

    A node has no data; it learns from the coordinator what the samples look like. It listens at
    ``nodes.host`` for its neighbours in the chains.

    Args:
      config: Resolved configuration.
      index: The node's index, from 1.
      address: The coordinator's host and port.
      model: The model, if not the configured one.
      stop: Ends the role when set.

    Raises:
      JoinError: The coordinator cannot be reached or refuses this node.
      PeerError: The coordinator was lost, or the run ended because of another host.
      RunError: This node failed, cannot listen, or the plan needs more memory than it may take.
    """
    set_up_jax(config.model)
    name, stop = node_name(index), stop or threading.Event()

    def take_part(timeout_s: float) -> None:
        worker = Worker(config, name, model, None, stop)
        _take_part(worker, address, lambda: node_join(config, name, worker.listen()), timeout_s)

    _persist(config.network, take_part, stop)


def make_loader(config: DataConfig, seed: int, index: int, dataset: Dataset) -> Loader:
    """Returns a device's mini-batches.

    Args:
      config: The samples' configuration.
      seed: The run's root seed.
      index: The device's index.
      dataset: Its data.

    Raises:
      DataError: An epoch has no mini-batch, or the augmentation does not fit.
    """
    return Loader(
        dataset.train,
        None,
        config.batch_size,
        seed=seed,
        device=index,
        augment=find_augmentation(config.augment),
        mean=dataset.mean,
        std=dataset.std,
        drop_last=config.drop_last,
        padding=dataset.padding,
    )


def _take_part(
    worker: Worker,
    address: tuple[str, int],
    join: Callable[[], JoinDevice | JoinNode],
    timeout_s: float,
) -> None:
    """Takes part once; an error says whether the coordinator had admitted the host."""
    try:
        worker.run(address, join(), timeout_s)
    except PiparError as error:
        error.taken = worker.admitted
        raise
    finally:
        worker.close()


def _persist(
    network: NetworkConfig, take_part: Callable[[float], None], stop: threading.Event
) -> None:
    """Takes part, again after a loss that may be temporary."""
    persist(take_part, join_timeout_s=network.join_timeout_s, rejoin_s=network.rejoin_s, stop=stop)
