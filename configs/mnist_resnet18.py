"""ResNet-18 on MNIST with the 3x3 stem for small images.

Command: pipar train --config=mnist_resnet18 --config.data.data_dir=FOLDER
where FOLDER holds MNIST, as published or as prepared by TFDS; otherwise it is downloaded.
The method is a field: --config.method=fl, sl, sfl.

Not the paper's setting: the stem is 3x3 and not 7x7 (--config.model.stem=imagenet), links have no
limit, and cut and N are given.
"""

from pipar_jax.config import Config


def get_config() -> Config:
    """Returns the preset."""
    config = Config(name="mnist_resnet18", method="pipar", epochs=5)
    config.model.name = "resnet18"
    config.data.source = "mnist"
    config.data.batch_size = 100
    config.optimizer.learning_rate = 0.01
    config.optimizer.momentum = 0.9
    config.pipeline.cut = 1
    config.pipeline.micro_batches = 4
    config.devices.count = 2
    return config
