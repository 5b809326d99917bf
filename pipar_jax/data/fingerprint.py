"""What tells one set of samples from another, so that a run is resumed on its own data alone."""

from __future__ import annotations

import numpy as np
import xxhash

from pipar_jax.data.types import Split

#: Bytes of images that are read at most, evenly spread: all of a small set, some of a large one.
MOST_BYTES = 64 << 20


def fingerprint(split: Split) -> str:
    """Returns 16 letters that depend on number, shape, type, order and content of samples.

    Labels count in full. Of images beyond ``MOST_BYTES`` every so many are read.

    Args:
      split: Images and labels.
    """
    digest = xxhash.xxh3_64()
    images, labels = split.images, np.ascontiguousarray(split.labels)
    digest.update(f"{images.dtype} {images.shape} {labels.dtype} {labels.shape};".encode())
    digest.update(labels.tobytes())
    stride = max(1, -(-images.nbytes // MOST_BYTES))
    for first in range(0, len(images), 1024 * stride):
        digest.update(images[first : first + 1024 * stride : stride].tobytes())
    return digest.hexdigest()
