"""Set-up shared by all roles from the configuration: precision, model, channel."""

from __future__ import annotations

import dataclasses
import functools
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import stages
from comms import ChannelOptions, TlsOptions
from pipar_jax.config import Config, LoraConfig, ModelConfig, NetworkConfig
from pipar_jax.config.plugins import OWN, read_args
from pipar_jax.config.tasks import make_task
from pipar_jax.config.texts import whole_numbers
from pipar_jax.data import Dataset, check_fits
from pipar_jax.data.types import computed
from pipar_jax.runtime.own_model import make_own
from stages.names import arguments_of
from stages.signature import Signature, unwrapped
from stages.tasks.targets import TargetRule

if TYPE_CHECKING:
    from stages import Model

#: Hosts of one process ask for their network at the same time.
_BUILDING = threading.Lock()


def set_up_jax(config: ModelConfig) -> None:
    """Loads jax for a model: with 64-bit numbers if the model computes with them.

    Compiled programs are cached so that other processes can use the cache at the same time. Both
    settings are global to the process; they are never reverted, since arrays made under them live
    on.
    """
    import jax  # here: launchers need the channel's settings, and no jax

    from stages.compile_cache import share_compile_cache

    share_compile_cache()
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]


def build_model(config: Config, signature: Signature, model: Model | None = None) -> Model:
    """Returns the configured model for samples of a signature.

    Args:
      config: The configuration.
      signature: Shapes and dtypes of a sample.
      model: The model, if not the configured one.

    Raises:
      RunError: The user's own network cannot be made.
      StageError: It cannot be trained or cut.
    """
    from stages.lengths import padded_to  # here: launchers load no jax

    made = _for_task(config, signature, model).receiving(signature.targets)
    return padded_to(made, whole_numbers(config.data.pad_to))


def _for_task(config: Config, signature: Signature, model: Model | None) -> Model:
    """Returns the configured model for the configured task."""
    if model is not None:
        return _with_task(config, model)
    if config.model.name.startswith(OWN):
        own = make_own(config.model, signature, whole=config.method == "fl")
        return as_trained(config, own)
    with _BUILDING:
        made = _registered(
            dataclasses.astuple(config.model),
            dataclasses.astuple(config.lora),
            config.seed,
            signature.input.shape,
            signature.classes,
        )
    return _completed(config, made)


@functools.lru_cache(maxsize=1)
def _registered(
    model: tuple[Any, ...],
    lora: tuple[Any, ...],
    seed: int,
    input_shape: tuple[int, ...],
    classes: int,
) -> Model:
    """Returns a registered network: one for all hosts of a process, which share what they compile.

    Args:
      model: The fields of ``config.model``.
      lora: The fields of ``config.lora``.
      seed: Root seed, from which frozen weights are drawn.
      input_shape: Shape of a sample.
      classes: Number of classes.
    """
    chosen, adapters = ModelConfig(*model), LoraConfig(*lora)
    made = stages.build(
        chosen.name,
        input_shape=input_shape,
        classes=classes,
        norm=chosen.norm,
        stem=chosen.stem,
        dtype=chosen.dtype,
        arguments=arguments_of(chosen.name, read_args(chosen.args)),
        lora=(adapters.match, adapters.rank, adapters.alpha) if adapters.match else None,
    )
    return _partly_trained(chosen, adapters, seed, made)


def fit(config: Config, model: Model | None, dataset: Dataset, host: str) -> Model:
    """Returns the model for the data of a host, which are checked against it.

    Args:
      config: The configuration.
      model: The model, if not the configured one.
      dataset: The host's data.
      host: The host's name, for messages.

    Raises:
      DataError: The data do not fit the model.
      RunError: The user's own network cannot be made.
      StageError: It cannot be trained or cut.
    """
    made = build_model(config, dataset.signature(config.model.weight_dtype), model)
    check_fits(dataset, made.signature, host)
    given = dataset.train if len(dataset.train) else dataset.test
    two = dataset.at_full_length(given.take(np.asarray([0, len(given) - 1]))).targets
    made.check_alone(
        unwrapped({name: computed(one, config.model.weight_dtype) for name, one in two.items()})
    )
    return made


def as_trained(config: Config, model: Model) -> Model:
    """Returns a model for the configured task, unless it has one, with its weights as configured.

    Some may be frozen, or personal.

    Raises:
      ConfigError: The task is not valid.
      RunError: A pattern of ``optimizer.groups`` matches no weight, or ``model.base`` does not fit.
      StageError: No weight matches ``model.trainable``, or none or all ``aggregation.personal``.
    """
    return _completed(config, _partly_trained(config.model, config.lora, config.seed, model))


def _partly_trained(config: ModelConfig, lora: LoraConfig, seed: int, model: Model) -> Model:
    """Returns a model with those of its weights frozen that are not to be trained."""
    from stages.layers.lora import ADAPTERS

    trainable = config.trainable or (ADAPTERS if lora.match else "")
    return model.training(trainable, seed) if trainable else model


def _completed(config: Config, model: Model) -> Model:
    """Returns a model with its task and its base weights; see ``as_trained``."""
    model = _with_task(config, model)
    if config.model.base:
        from pipar_jax.training.base_weights import based

        model = based(model, Path(config.model.base))
    if config.aggregation.personal:
        from stages.personal import personalise

        model = personalise(model, config.aggregation.personal)
    if config.optimizer.groups:
        from pipar_jax.training.optimizer import check_groups

        trained = [f"{unit.name}/{path}" for unit in model.units for path in unit.params]
        check_groups(config.optimizer, trained)
    return model


def target_rule(config: Config, model: Model | None) -> TargetRule:
    """Returns what targets have to be for a model, or for the configured task.

    Raises:
      ConfigError: The task is not valid.
      RunError: The user's own task cannot be made.
    """
    known = model is not None and model.has_task
    return (model.task if known and model is not None else make_task(config.task)).targets


def _with_task(config: Config, model: Model) -> Model:
    """Returns a model for the configured task, unless it has one."""
    return model if model.has_task else model.for_task(make_task(config.task))


def tls_options(network: NetworkConfig) -> TlsOptions | None:
    """Returns the channel's TLS settings; None unless any of its files is configured."""
    if not (network.authority or network.certificate):
        return None
    return TlsOptions(
        authority=network.authority or None,
        certificate=network.certificate or None,
        key=network.key or None,
        require_peer=network.require_certificate,
    )


def channel_options(network: NetworkConfig, window_mb: float) -> ChannelOptions:
    """Returns the channel's settings.

    Args:
      network: Authentication, encryption and time limits.
      window_mb: Credit of a link in megabytes.
    """
    return ChannelOptions(
        tls=tls_options(network),
        resume_s=network.resume_s,
        deadline_s=network.deadline_s,
        window_bytes=int(window_mb * 1e6),
        token=network.token,
        listen_openly=network.insecure,
        checksum={"auto": None, "on": True, "off": False}[network.checksum],
    )
