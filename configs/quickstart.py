"""The demo's preset: digits on two slow devices behind 4G+ links.

Command: make demo (pipar quickstart), which trains this preset by each method.
Group normalisation, so that FL, SFL and PiPar compute the same and only their time differs.

Not the paper's setting: data, batch, optimiser and normalisation are for a demo of a minute, and
cut and N are given; the link is the paper's 4G+.
"""

from pipar_jax.config import Config


def get_config() -> Config:
    """Returns the preset."""
    config = Config(name="quickstart", method="pipar", epochs=6)
    config.model.name = "vgg5"
    config.model.norm = "group"
    config.data.source = "digits"
    config.data.batch_size = 50
    config.optimizer.learning_rate = 0.02
    config.pipeline.cut = 1
    config.pipeline.micro_batches = 5
    config.devices.count = 2
    # A Raspberry Pi 4 takes 18 to 48 times as long as a server in MP-SL's published profiles.
    config.devices.defaults.slowdown = 50.0
    config.devices.defaults.link = "4g+"
    return config
