"""ResNet-18 on CIFAR-10 by AccEPT: one device's data on a chain of four unequal edge devices.

Command: pipar train --config=cifar10_resnet18_accept --config.data.data_dir=FOLDER
where FOLDER holds CIFAR-10, as published or as prepared by TFDS; otherwise it is downloaded.
The device and its three peers take 1, 2, 4 and 8 times the compute time of a core of this machine;
the planner balances the cuts over them and the links.

Not the paper's setting: of AccEPT only the abstract is public, so that network, stem, batch,
links and devices are ours.
"""

from pipar_jax.config import Config


def get_config() -> Config:
    """Returns the preset."""
    config = Config(name="cifar10_resnet18_accept", method="accept", epochs=20)
    config.model.name = "resnet18"
    config.data.source = "cifar10"
    config.data.augment = "crop_flip"
    config.data.batch_size = 100
    config.optimizer.learning_rate = 0.01
    config.optimizer.momentum = 0.9
    config.pipeline.micro_batches = 4
    config.devices.count = 1
    config.devices.defaults.link = "50/50"
    config.nodes.count = 3
    config.nodes.defaults.link = "50/50"
    config.nodes.overrides = {index: {"slowdown": 2.0**index} for index in (1, 2, 3)}
    return config
