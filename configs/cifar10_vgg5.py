"""VGG-5 on CIFAR-10 over links without a limit.

Command: pipar train --config=cifar10_vgg5 --config.data.data_dir=FOLDER
where FOLDER holds CIFAR-10, as published or as prepared by TFDS; otherwise it is downloaded.
The method is a field: --config.method=fl, sl, sfl.

Not the paper's setting: links have no limit, and cut and N are given; optimiser and batch are the
defaults of the paper's public code: SGD 0.01, momentum 0.9, batch 100. cifar10_vgg5_paper is it.
"""

from pipar_jax.config import Config


def get_config() -> Config:
    """Returns the preset."""
    config = Config(name="cifar10_vgg5", method="pipar", epochs=20)
    config.model.name = "vgg5"
    config.data.source = "cifar10"
    config.data.augment = "crop_flip"
    config.data.batch_size = 100
    config.optimizer.learning_rate = 0.01
    config.optimizer.momentum = 0.9
    config.pipeline.cut = 1
    config.pipeline.micro_batches = 4
    config.devices.count = 2
    return config
