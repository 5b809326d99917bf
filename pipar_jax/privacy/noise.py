"""Random bits for noise and randomised labels: a stream cipher with a key of 256 bits.

The keys of jax's default generator have 64 bits, few enough to be searched by whoever wants to
subtract the noise; its others, and those of numpy, are not made to withstand an adversary at all.
So bits come from ChaCha20 (RFC 8439) of the library cryptography, keyed by the operating system's
entropy; a compiled stage turns them into normal numbers (``stages.release``).
"""

from __future__ import annotations

import hashlib
import math
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

KEY_BYTES = 32
#: No noise is further from zero than this many standard deviations.
FARTHEST = 9.5


class NoiseSource:
    """A stream of random bits, none of which is given twice. Not safe for use by several threads.

    Args:
      key: 32 secret bytes that no other stream is made of; None for the system's entropy.
    """

    def __init__(self, key: bytes | None = None) -> None:
        # The stream is the encryption of zeros; a key makes one stream, so the nonce is constant.
        cipher = Cipher(ChaCha20(key or os.urandom(KEY_BYTES), bytes(16)), mode=None)
        self._stream = cipher.encryptor()

    def bits(self, *shape: int) -> NDArray[np.uint32]:
        """Returns the next bits as [*shape] uint32."""
        count = int(np.prod(shape, dtype=np.int64))
        made = np.frombuffer(bytearray(self._stream.update(bytes(4 * count))), np.uint32)
        return made.reshape(shape)

    def normal(self) -> float:
        """Returns a standard normal number, by Box and Muller, for noise on a single number."""
        high, low, angle, _ = map(int, self.bits(4))
        uniform = ((high << 32 | low) + 0.5) * 2.0**-64
        return math.sqrt(-2.0 * math.log(uniform)) * math.cos(2.0 * math.pi * angle * 2.0**-32)


def reproducible_key(*what: object) -> bytes:
    """Returns a key that anyone can compute who knows the configuration: it protects nothing.

    Args:
      *what: The seed, and what tells this stream from others.
    """
    return hashlib.sha256("\0".join(map(str, ("pipar_jax", *what))).encode()).digest()
