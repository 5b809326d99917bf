"""Labels that leave a device: memoised randomised response."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipar_jax.disk.files import describe_reading, make_folder, write_secret
from pipar_jax.errors import RunError
from pipar_jax.privacy.accountant import keep_probability
from pipar_jax.privacy.noise import KEY_BYTES, NoiseSource

#: A device's secret in its host's folder: whoever has it can tell true labels from given ones.
SECRET = "privacy.key"  # the name of a file


def read_secret(folder: Path, earlier: tuple[Path, ...] = ()) -> bytes:
    """Returns a device's secret, which is made when it is first asked for.

    It is kept, so that a device that starts again gives the same answers for its labels: answers
    drawn anew would reveal more of them.

    Args:
      folder: The host's folder.
      earlier: Folders of runs that this one continues, from which it is taken over.

    Raises:
      DiskError: It cannot be written.
      RunError: It cannot be read.
    """
    for one in (folder, *earlier):
        try:
            secret = (one / SECRET).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise RunError(f"{one / SECRET} cannot be read: {describe_reading(error)}") from error
        if len(secret) != KEY_BYTES:
            raise RunError(
                f"{one / SECRET} has {len(secret)} bytes, expected {KEY_BYTES}: restore the file, "
                "or begin a run under another name"
            )
        if one != folder:
            _write(folder, secret)
        return secret
    secret = os.urandom(KEY_BYTES)
    _write(folder, secret)
    return secret


def _write(folder: Path, secret: bytes) -> None:
    write_secret(make_folder(folder) / SECRET, secret)


def response_name(secret: bytes, fingerprint: str, classes: int, epsilon: float) -> str:
    """Returns what tells a response's draws from others; nobody else can compute it.

    Args:
      secret: The device's secret.
      fingerprint: What tells its samples from others.
      classes: Number of classes.
      epsilon: The response's epsilon.
    """
    what = f"labels {fingerprint} {classes} {epsilon!r}"
    return hmac.new(secret, what.encode(), hashlib.sha256).hexdigest()[:16]


def randomised(
    labels: NDArray[np.int32], classes: int, epsilon: float, secret: bytes, response: str
) -> NDArray[np.int32]:
    """Returns the labels that a device gives instead of its own, the same ones in every call.

    Args:
      labels: [samples] int32 classes.
      classes: Number of classes.
      epsilon: How much an answer may tell of its label.
      secret: The device's secret.
      response: The response's name, of which the draws are a function.
    """
    key = hmac.new(secret, response.encode(), hashlib.sha256).digest()
    source = NoiseSource(key)
    # 53 random bits, as many as a double has.
    high, low = source.bits(2, len(labels)).astype(np.uint64)
    uniform = ((high << np.uint64(21)) ^ (low >> np.uint64(11))).astype(np.float64) * 2.0**-53
    other = (
        source.bits(2, len(labels)).astype(np.uint64) << [[np.uint64(32)], [np.uint64(0)]]
    ).sum(0, dtype=np.uint64) % np.uint64(max(classes - 1, 1))
    kept = uniform < keep_probability(epsilon, classes)
    # One of the other classes: those from the label's on move up by one.
    given = other + (other >= labels.astype(np.uint64))
    return np.where(kept, labels, given.astype(np.int32)).astype(np.int32)


def keyed_fingerprint(secret: bytes, fingerprint: str) -> str:
    """Returns what tells a device's samples from others without letting anyone test a guess."""
    return hmac.new(secret, f"data {fingerprint}".encode(), hashlib.sha256).hexdigest()
