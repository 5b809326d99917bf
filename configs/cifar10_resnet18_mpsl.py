"""ResNet-18 on CIFAR-10 by MP-SL: four devices, three compute nodes, labels stay on the devices.

Command: pipar train --config=cifar10_resnet18_mpsl --config.data.data_dir=FOLDER
where FOLDER holds CIFAR-10, as published or as prepared by TFDS; otherwise it is downloaded.
The planner chooses the cuts; --config.pipeline.cuts sets them instead,
--config.pipeline.weights=shared keeps one copy of each middle stage for all devices, and
--config.pipeline.labels=end sends the labels to the last node.

Not the paper's setting: the network is smaller than MP-SL's ResNet-101 and VGG-19, with group
normalisation and the 3x3 stem, the batch is 32 and not 16, several micro-batches are in flight, and
links have no limit, where its owners have 8 Mbit/s.
"""

from pipar_jax.config import Config


def get_config() -> Config:
    """Returns the preset."""
    config = Config(name="cifar10_resnet18_mpsl", method="mpsl", epochs=20)
    config.model.name, config.model.norm = "resnet18", "group"
    config.data.source = "cifar10"
    config.data.augment = "crop_flip"
    config.data.batch_size = 32
    config.optimizer.learning_rate = 0.01
    config.optimizer.momentum = 0.9
    config.pipeline.micro_batches = 2
    config.devices.count = 4
    config.nodes.count = 3
    return config
