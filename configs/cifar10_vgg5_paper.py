"""VGG-5 on CIFAR-10 behind 4G, as in the PiPar paper.

Command: pipar train --config=cifar10_vgg5_paper --config.data.data_dir=FOLDER
where FOLDER holds CIFAR-10, as published or as prepared by TFDS; otherwise it is downloaded.
The method is a field: --config.method=fl, sl, sfl, pipar. With these, cut and N are pipeline.cut
and pipeline.micro_batches.

This is the paper's setting: the network, 4G with 10 Mbit/s up and 25 down
(--config.devices.defaults.link=4g+ and wifi are its others), cut and N by its own formulas, and the
optimiser and batch of its public code: SGD 0.01, momentum 0.9, batch 100. The numbers of devices
and epochs and the augmentation are ours. The paper reports 79.95, 79.55 and 79.15 % test
accuracy for FL, SFL and PiPar; ours has not been measured.
"""

from pipar_jax.config import Config


def get_config() -> Config:
    """Returns the preset."""
    config = Config(name="cifar10_vgg5_paper", method="auto", epochs=20)
    config.model.name = "vgg5"
    config.data.source = "cifar10"
    config.data.augment = "crop_flip"
    config.data.batch_size = 100
    config.optimizer.learning_rate = 0.01
    config.optimizer.momentum = 0.9
    config.tuner.select = "paper"
    config.devices.count = 2
    config.devices.defaults.link = "4g"
    return config
