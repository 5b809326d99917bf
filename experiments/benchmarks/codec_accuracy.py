"""What codecs cost in accuracy at the end of training, from paired seeds: ``bench_codec``'s trials.

VGG-5 on MNIST and CIFAR-10, PiPar, two devices, cut 2, N = 4. Links have no limit, since they do
not change what is learned. A pair is two runs of one seed, with the codec and raw, from the same
weights on the same shards in the same order.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from configs import cifar10_vgg5_central, mnist_vgg5
from pipar_jax.config import Config
from pipar_jax.launch import launcher

#: Data sets, each with the preset whose optimiser and epochs train it to the end.
DATA = {"mnist": mnist_vgg5.get_config, "cifar10": cifar10_vgg5_central.get_config}
#: Codecs of activations and cotangents: the least bits of ``tuner.codecs=safe`` and of ``auto``.
CASES = {
    "raw": ("raw", "raw"),
    "bits:7": ("bits:7", "bits:7"),
    "bits:3 / bits:7": ("bits:3", "bits:7"),
}
SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
      data: Name of the data set.
      case: Name of the codecs.
      seed: Seed of weights and order.
      data_dir: Folder of public data sets.
      quick: Whether to train an epoch on few samples.
    """

    data: str
    case: str
    seed: int
    data_dir: str
    quick: bool = False

    @property
    def name(self) -> str:
        """Name of the measurement, and of the run."""
        case = "-".join(CASES[self.case]).replace(":", "")
        return f"codec-{self.data}-{case}-seed{self.seed}{'-quick' if self.quick else ''}"

    def config(self, folder: Path) -> Config:
        """Returns its configuration, with runs in a folder."""
        config = DATA[self.data]()
        config.name, config.method, config.seed = self.name, "pipar", self.seed
        config.data.data_dir, config.run.dir = self.data_dir, str(folder)
        config.devices.count, config.pipeline.cut, config.pipeline.micro_batches = 2, 2, 4
        codecs = CASES[self.case]
        config.pipeline.activation_codec, config.pipeline.cotangent_codec = codecs
        config.run.trace, config.run.evaluate_every = "none", 0
        if self.quick:
            config.epochs, config.data.train_samples, config.data.test_samples = 1, 400, 200
        return config


def accuracy(setting: Setting, folder: Path) -> float:
    """Returns the test accuracy in % after training in processes."""
    return 100 * float(launcher.launch(setting.config(folder))["metrics"]["accuracy"])
