"""ResNet-18 on CIFAR-10 with the 3x3 stem for small images.

Command: pipar train --config=cifar10_resnet18 --config.data.data_dir=FOLDER
where FOLDER holds CIFAR-10, as published or as prepared by TFDS; otherwise it is downloaded.
The method is a field: --config.method=fl, sl, sfl.

Not the paper's setting: the stem is 3x3 and not 7x7, links have no limit, and cut and N are given.
cifar10_resnet18_paper is it.
"""

from pipar_jax.config import Config


def get_config() -> Config:
    """Returns the preset."""
    config = Config(name="cifar10_resnet18", method="pipar", epochs=20)
    config.model.name = "resnet18"
    config.data.source = "cifar10"
    config.data.augment = "crop_flip"
    config.data.batch_size = 100
    config.optimizer.learning_rate = 0.01
    config.optimizer.momentum = 0.9
    config.pipeline.cut = 1
    config.pipeline.micro_batches = 4
    config.devices.count = 2
    return config
