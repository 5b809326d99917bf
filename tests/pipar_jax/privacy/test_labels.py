"""Labels are randomised once: the same answers after a restart, with the claimed probability."""

from __future__ import annotations

import numpy as np
import pytest

from pipar_jax.errors import RunError
from pipar_jax.privacy import labels
from pipar_jax.privacy.accountant import keep_probability
from pipar_jax.privacy.noise import KEY_BYTES, NoiseSource, reproducible_key


def test_labels_are_kept_with_the_claimed_probability_and_else_uniform():
    secret = bytes(range(32))
    own = np.repeat(np.arange(10, dtype=np.int32), 5000)
    given = labels.randomised(own, 10, 2.0, secret, "response")
    kept = np.mean(given == own)
    assert kept == pytest.approx(keep_probability(2.0, 10), abs=0.01)
    counts = np.array([[np.sum((own == a) & (given == b)) for b in range(10)] for a in range(10)])
    others = counts[~np.eye(10, dtype=bool)] / 5000
    assert np.all(np.abs(others - (1 - keep_probability(2.0, 10)) / 9) < 0.016)
    assert given.dtype == np.int32 and given.min() == 0 and given.max() == 9


def test_answers_are_memoised_by_a_secret_on_disk(tmp_path):
    secret = labels.read_secret(tmp_path / "d0")
    assert labels.read_secret(tmp_path / "d0") == secret
    assert labels.read_secret(tmp_path / "next", (tmp_path / "d0",)) == secret
    assert labels.read_secret(tmp_path / "d1") != secret
    assert (tmp_path / "d0" / labels.SECRET).stat().st_mode & 0o077 == 0
    own = np.zeros(100, np.int32)
    first, again, other = (labels.randomised(own, 10, 1.0, secret, name) for name in "aab")
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    names = {labels.response_name(secret, data, 10, 1.0) for data in ("x", "x", "y")}
    assert len(names) == 2
    (tmp_path / "d0" / labels.SECRET).write_bytes(b"short")
    with pytest.raises(RunError, match="5 bytes"):
        labels.read_secret(tmp_path / "d0")


def test_a_fingerprint_cannot_be_tested_without_the_secret():
    assert labels.keyed_fingerprint(b"a" * 32, "x") != labels.keyed_fingerprint(b"b" * 32, "x")
    assert labels.keyed_fingerprint(b"a" * 32, "x") == labels.keyed_fingerprint(b"a" * 32, "x")


def test_the_stream_is_chacha20_and_never_repeats():
    # RFC 8439, A.1, test vector 1: key and nonce of zeros.
    expected = bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    assert NoiseSource(bytes(KEY_BYTES)).bits(8).tobytes() == expected
    source = NoiseSource()
    blocks = [source.bits(4, 4).tobytes() for _ in range(100)]
    assert len(set(blocks)) == 100
    assert NoiseSource().bits(8).tobytes() != NoiseSource().bits(8).tobytes()
    assert len(reproducible_key(0, "d0", 1)) == KEY_BYTES
    assert reproducible_key(0, "d0", 1) != reproducible_key(0, "d0", 2)
