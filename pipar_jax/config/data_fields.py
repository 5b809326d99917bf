"""The samples.

Annotations are real objects (no ``from __future__ import annotations``); see ``fields``.
"""

import dataclasses

from pipar_jax.config.schema import REGISTERED, option

#: Prefixes of the user's own data.
OWN_SOURCES = ("npz:", "npy:", "module:")
#: Of these, the prefixes of files and folders.
_FILES = OWN_SOURCES[:2]


@dataclasses.dataclass(slots=True)
class DataConfig:
    """The samples and their partition among the devices."""

    source: str = option(
        "digits",
        "data set: {names}, or your own: npz:PATH, npy:FOLDER of NAME.npy, or module:NAME:FUNCTION "
        "({device} in it is replaced by the device's index)",
        path=_FILES,
    )
    test_source: str = option(
        "",
        "own data: where the server reads the test set (npz:PATH, npy:FOLDER, "
        "module:NAME:FUNCTION); empty: the same as `source`",
        path=_FILES,
    )
    classes: int = option(
        0,
        "own data: number of classes or outputs; 0: as given by the data, or the highest label + 1",
        at_least=0,
    )
    scale: float = option(
        0.0,
        "own data: divisor of stored numbers, for instance 255 for pixels; 0: as given by the data",
        at_least=0,
    )
    normalise: str = option(
        "given",
        "normalisation of the input; given: (x / scale - mean) / std with what is given with the "
        "data or published with the set, unchanged without; none: unchanged in any case, whole "
        "numbers such as tokens included",
        choices=("given", "none"),
    )
    data_dir: str = option(
        "",
        "folder of public data sets, as published or as prepared by TFDS; empty: TFDS's default, "
        "then the user's cache folder",
        path="",
    )
    download: bool = option(
        True, "download a missing public data set into data_dir, or into the user's cache folder"
    )
    cache_dir: str = option(
        "", "folder for decoded arrays; empty: the user's cache folder", path=""
    )
    partition: str = option(
        "iid", "partition of a public data set among the devices", choices=REGISTERED
    )
    alpha: float = option(
        0.5, "dirichlet, quantity: concentration; smaller values are more unequal", above=0
    )
    shards_per_device: int = option(2, "labels: number of label shards per device", at_least=1)
    train_samples: int = option(
        0, "use only this many training samples in total; 0: all", at_least=0
    )
    test_samples: int = option(0, "use only this many test samples; 0: all", at_least=0)
    augment: str = option(
        "none",
        "augmentation; crop_flip: shift by up to 4 pixels and flip horizontally; your own: "
        "module:NAME:FUNCTION, called with a sample's input and a random number generator",
    )
    max_samples: int = option(
        10_000_000,
        "largest number of samples that the server accepts from one device",
        at_least=1,
    )
    pad_to: str = option(
        "",
        "samples of different lengths: the lengths to which mini-batches are padded, such as "
        "32,64,128, each to the smallest that holds its longest sample; empty: all samples are "
        "equally long",
    )
    batch_size: int = option(100, "samples per mini-batch on one device", at_least=1)
    drop_last: bool = option(False, "drop the incomplete last mini-batch of an epoch")
