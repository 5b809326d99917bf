"""Private training beside training that is not: accuracies, epochs behind links, and single steps.

``experiments.bench_privacy`` runs these trials. All networks have group normalisation, since a
private run has no batch statistics on a device.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stages
from configs import cifar10_vgg5, mnist_vgg5
from pipar_jax.config import Config
from pipar_jax.launch import launcher
from pipar_jax.launch.pinning import first_cores
from pipar_jax.methods.registry import METHODS
from pipar_jax.privacy.ledger import PrivacyLedger
from pipar_jax.privacy.noise import NoiseSource
from pipar_jax.privacy.spending import Entry
from stages.release import PrivateRelease, add_noise, bits_shape

DATA = {"mnist": mnist_vgg5.get_config, "cifar10": cifar10_vgg5.get_config}
#: Budgets of a device at delta = 1e-5; None: not private.
EPSILONS = (None, 8.0, 2.0)
DEVICES, MICRO_BATCHES, CLIP, LEARNING_RATE = 2, 4, 1.0, 0.05


@dataclasses.dataclass(frozen=True)
class Variant:
    """A method and where it cuts.

    Attributes:
      method: Name of the method.
      cut: Position of the cut; 0 without one.
    """

    method: str
    cut: int = 0

    def __str__(self) -> str:
        return f"{self.method}, cut {self.cut}" if self.cut else self.method


VARIANTS = (Variant("fl"), Variant("pipar", 1), Variant("pipar", 2))


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one run trains, and how privately.

    Attributes:
      data: Name of the data set.
      variant: Method and cut.
      epsilon: Budget of a device; None: not private.
      seed: Seed of weights and order.
      samples: Training samples of both devices together.
      epochs: Number of epochs.
      data_dir: Folder of public data sets.
    """

    data: str
    variant: Variant
    epsilon: float | None
    seed: int
    samples: int
    epochs: int
    data_dir: str

    @property
    def name(self) -> str:
        """Name of the measurement, and of the run."""
        budget = "none" if self.epsilon is None else f"{self.epsilon:g}"
        where = f"{self.variant.method}{self.variant.cut or ''}"
        return f"{self.data}-{where}-eps{budget}-seed{self.seed}-{self.samples}x{self.epochs}"

    def config(self, folder: Path) -> Config:
        """Returns its configuration, with runs in a folder."""
        config = DATA[self.data]()
        config.name, config.method, config.seed = self.name, self.variant.method, self.seed
        config.epochs, config.run.dir = self.epochs, str(folder)
        config.data.data_dir, config.data.train_samples = self.data_dir, self.samples
        config.model.norm, config.data.augment = "group", "none"
        config.optimizer.learning_rate = LEARNING_RATE
        config.devices.count, config.pipeline.micro_batches = DEVICES, MICRO_BATCHES
        config.pipeline.cut = self.variant.cut or 1
        config.run.trace, config.run.evaluate_every = "none", 0
        if self.epsilon is not None:
            make_private(config, self.epsilon)
        return config


def make_private(config: Config, epsilon: float) -> None:
    """Sets a budget and the clips that a configuration's method needs; labels are unprotected."""
    config.privacy.epsilon, config.privacy.update_clip = epsilon, CLIP
    if METHODS[config.method].cuts:
        config.privacy.activation_clip = CLIP


def accuracy(setting: Setting, folder: Path) -> float:
    """Returns the test accuracy, in [0, 1], after training in processes."""
    return float(launcher.launch(setting.config(folder))["metrics"]["accuracy"])


def epochs_s(setting: Setting, link: str, slowdown: float, folder: Path) -> list[float]:
    """Returns the seconds of a run's epochs behind emulated links, without the first.

    Args:
      setting: What is trained.
      link: The link of each device.
      slowdown: How many times longer a device's computations take than on this machine.
      folder: Where the run goes.
    """
    config = setting.config(folder)
    config.name += f"-{link.replace('/', '-').replace('+', 'p')}"
    config.devices.defaults.link, config.devices.defaults.slowdown = link, slowdown
    cores = first_cores(2)
    if cores:
        config.server.cpus, config.devices.defaults.cpus = str(cores[0]), str(cores[-1])
    seconds: list[float] = []

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "round_finished":
            seconds.append(event["seconds"])

    launcher.launch(config, on_event=note)
    return seconds[1:]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Returns the mean and its standard error; nan for a single value."""
    if len(values) < 2:
        return values[0], float("nan")
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def mechanisms(batch: int, cut: int, ledger: PrivacyLedger) -> dict[str, Callable[[], object]]:
    """Returns what a private device does for a mini-batch, and what a plain one does instead.

    VGG-5 on CIFAR-10's shapes, one micro-batch, the device's part of the model.

    Args:
      batch: Samples.
      cut: The cut.
      ledger: Where its releases are entered.
    """
    model = stages.build("vgg5", input_shape=(32, 32, 3), classes=10, norm="group")
    shape = tuple(model.shapes(1)[cut].shape[1:])
    release = PrivateRelease(4.0, activation_clip=CLIP, gradient_clip=CLIP, shape=shape)
    plain, private = (
        stages.split(model, (cut,), releases=releases)[0] for releases in ({}, {0: release})
    )
    params, state = (stages.select(plain, part) for part in model.init(0))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, 32, 32, 3)), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=(batch, *shape)), jnp.float32) / batch
    source = NoiseSource()
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    sent, summed = release.bits_shape(batch), bits_shape(weights)
    draws = {False: stages.make_draw(batch), True: private.trial_draw(batch)}
    kept = {
        one.release is not None: one.forward(
            params, state, x, draws[one.release is not None]
        )[1]
        for one in (plain, private)
    }  # fmt: skip
    gradient = plain.zeros(params)
    bits, deviation = source.bits(*summed), np.float32(0.01)

    def forward(stage: stages.Stage) -> object:
        return stage.forward(params, state, x, draws[stage.release is not None])[0]

    def backward(stage: stages.Stage) -> object:
        residuals = kept[stage.release is not None]
        return stage.backward(params, residuals, cotangent, stage.zeros(params))[1]

    return {
        "forward": lambda: forward(plain),
        "forward, clipped and noised": lambda: forward(private),
        "backward": lambda: backward(plain),
        "backward, each example clipped": lambda: backward(private),
        "noise on the gradient": lambda: add_noise(gradient, bits, deviation),
        "bits for an activation": lambda: source.bits(*sent),
        "bits for the gradient": lambda: source.bits(*summed),
        "ledger entry on disk": lambda: ledger.add(Entry("epoch", 0, 1.0), ("activations",)),
    }
