"""Mini-batches are a function of (seed, device, step); prefetching changes nothing but the time."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest

from pipar_jax.data import Examples, Loader, Prefetcher, steps_per_epoch
from pipar_jax.data.loader import PADDING, crop_flip
from pipar_jax.data.types import normalise
from pipar_jax.errors import DataError, RunError
from tests.patience import PATIENCE_S

RANDOM = np.random.default_rng(0)
# Each image holds its own number in every pixel, so that a batch shows which samples it has.
SPLIT = Examples.of(
    np.broadcast_to(np.arange(25, dtype=np.uint8)[:, None, None, None], (25, 6, 5, 3)).copy(),
    np.arange(25, dtype=np.int32),
)


def make(**changes: object) -> Loader:
    fields: dict = {"seed": 1, "device": 0, **changes}
    return Loader(SPLIT, fields.pop("indices", None), fields.pop("batch_size", 10), **fields)


def test_an_epoch_has_every_sample_once_and_the_next_another_order() -> None:
    loader = make()
    assert loader.steps_per_epoch == 3
    first = [loader.batch(step).targets["y"] for step in range(3)]
    second = [loader.batch(step).targets["y"] for step in range(3, 6)]
    assert [len(labels) for labels in first] == [10, 10, 5]
    for epoch in (first, second):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(25))
    assert np.concatenate(first).tolist() != np.concatenate(second).tolist()


def test_images_and_labels_belong_together_and_have_their_types() -> None:
    batch = make(mean=0, std=1).batch(0)
    images, labels = batch.x, batch.targets["y"]
    assert images.dtype == np.float32 and images.shape == (10, 6, 5, 3)
    assert labels.dtype == np.int32
    assert np.array_equal(images[:, 0, 0, 0].astype(np.int32), labels)


def test_only_the_given_indices_are_used() -> None:
    loader = make(indices=np.array([3, 5, 7, 11]), batch_size=4)
    assert sorted(loader.batch(0).targets["y"].tolist()) == [3, 5, 7, 11]


def test_a_batch_depends_on_seed_device_and_step_and_on_nothing_else() -> None:
    loader = make(augment="crop_flip")
    forwards = [loader.batch(step) for step in range(6)]
    backwards = [loader.batch(step) for step in reversed(range(6))][::-1]
    other = make(augment="crop_flip")
    for (x1, _, y1), (x2, _, y2), step in zip(forwards, backwards, range(6), strict=True):
        x3, _, y3 = other.batch(step)
        assert np.array_equal(x1, x2) and np.array_equal(x1, x3)
        assert np.array_equal(y1["y"], y2["y"]) and np.array_equal(y1["y"], y3["y"])
    for changed in (make(seed=2), make(device=1)):
        assert changed.batch(0).targets["y"].tolist() != forwards[0].targets["y"].tolist()


def test_augmentation_of_a_sample_does_not_depend_on_the_batch_size() -> None:
    split = Examples.of(
        RANDOM.integers(0, 255, (12, 8, 8, 1), np.uint8), np.arange(12, dtype=np.int32)
    )

    def epoch(batch_size: int) -> dict[int, bytes]:
        loader = Loader(split, None, batch_size, seed=0, device=0, augment="crop_flip")
        batches = [loader.batch(step) for step in range(loader.steps_per_epoch)]
        return {
            int(y): x.tobytes()
            for one in batches
            for x, y in zip(one.x, one.targets["y"], strict=True)
        }

    assert epoch(4) == epoch(5) == epoch(12)


def test_normalisation_is_per_channel_in_units_of_the_stored_images() -> None:
    mean, std = np.array([1, 2, 3], np.float32), np.array([2, 4, 8], np.float32)
    batch = make(mean=mean, std=std).batch(0)
    images, labels = batch.x, batch.targets["y"]
    expected = (labels[:, None, None, None].astype(np.float32) - mean) / std
    np.testing.assert_allclose(images, np.broadcast_to(expected, images.shape), rtol=1e-6)


@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 5, 3), (7, 4, 5, 3), (0, 3), (0,)])
def test_samples_of_every_rank_are_normalised(shape: tuple[int, ...]) -> None:
    channels = shape[-1] if len(shape) > 1 else 1
    mean, std = np.arange(1.0, 1 + channels, dtype=np.float32), np.full(channels, 2, np.float32)
    x = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    found = normalise(x, mean, std)
    assert found.shape == shape and found.dtype == np.float32
    np.testing.assert_allclose(found, (x.astype(np.float32) - mean) / std, rtol=1e-6)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "float32", "float64"])
def test_no_digit_of_what_is_stored_is_lost_before_the_computation(dtype, scaled) -> None:
    x = (np.arange(6).reshape(2, 3) / (3 if dtype.startswith("float") else 1)).astype(dtype)
    mean, std = (np.ones(3, np.float32), np.full(3, 3, np.float32)) if scaled else (None, None)
    found = normalise(x, mean, std)
    wide = np.float64 if dtype == "float64" else np.float32
    expected = (x.astype(wide) - wide(1)) / wide(3) if scaled else x
    np.testing.assert_allclose(found, expected, rtol=4 * np.finfo(wide).eps, atol=1e-7)
    if dtype == "float64":
        np.testing.assert_allclose(found, expected, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("samples", [1, 9, 10, 11, 25])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batch_samples_is_what_the_loader_does(samples: int, drop_last: bool) -> None:
    if drop_last and samples < 10:
        with pytest.raises(DataError, match="no full mini-batch"):
            steps_per_epoch(samples, 10, drop_last)
        return
    loader = make(indices=np.arange(samples), drop_last=drop_last)
    for step in range(2 * loader.steps_per_epoch + 1):
        size = len(loader.batch(step).targets["y"])
        assert size == loader.batch_samples(step)
        assert size > 0


def test_crop_flip_shifts_with_zeros_and_mirrors() -> None:
    images = RANDOM.integers(1, 255, (4, 6, 5, 2), np.uint8)
    draws = np.array([[PADDING, PADDING, 0], [PADDING, PADDING, 1], [PADDING + 2, PADDING, 0],
                      [PADDING, PADDING - 1, 0]])  # fmt: skip
    made = crop_flip(images, draws)
    assert np.array_equal(made[0], images[0])
    assert np.array_equal(made[1], images[1][:, ::-1])
    assert np.array_equal(made[2][:-2], images[2][2:]) and not made[2][-2:].any()
    assert np.array_equal(made[3][:, 1:], images[3][:, :-1]) and not made[3][:, 0].any()


def test_crop_flip_draws_every_shift_and_both_sides() -> None:
    side, count, reach = 3 * PADDING, 2000, set(range(-PADDING, PADDING + 1))
    # Each pixel holds its own place, so that an image shows where its centre came from.
    places = np.arange(1, side * side + 1, dtype=np.uint8).reshape(1, side, side, 1)
    loader = Loader(
        Examples.of(np.repeat(places, count, axis=0), np.arange(count, dtype=np.int32)),
        None, count, seed=0, device=0, augment="crop_flip",
    )  # fmt: skip

    def drawn(epoch: int) -> np.ndarray:
        """Returns each sample's row and column of the pixel in the middle, and its mirroring."""
        batch = loader.batch(epoch)
        images, labels = batch.x, batch.targets["y"]
        middle = images[np.argsort(labels), side // 2, side // 2 : side // 2 + 2, 0].astype(int) - 1
        return np.stack([*np.divmod(middle[:, 0], side), middle[:, 0] > middle[:, 1]], axis=1)

    draws = drawn(0)
    mirrored = draws[:, 2] == 1
    assert set((draws[:, 0] - side // 2).tolist()) == reach
    assert set((draws[~mirrored, 1] - side // 2).tolist()) == reach
    assert set((draws[mirrored, 1] - side // 2 + 1).tolist()) == reach
    assert 0.45 < mirrored.mean() < 0.55
    assert not np.array_equal(draws, drawn(1))


def test_prefetching_gives_the_same_batches() -> None:
    loader = make(augment="crop_flip")
    prefetcher = Prefetcher(make(augment="crop_flip"), first_step=2)
    for step in range(2, 9):
        ours, theirs = prefetcher.get(step), loader.batch(step)
        assert np.array_equal(ours.x, theirs.x)
        assert np.array_equal(ours.targets["y"], theirs.targets["y"])
    prefetcher.close()
    prefetcher.close()
    with pytest.raises(RunError, match="closed"):
        prefetcher.get(9)


def test_a_round_that_is_undone_or_missed_is_gone_on_with_at_any_step() -> None:
    loader, prefetcher = make(), Prefetcher(make())
    for step in (0, 1, 2, 1, 2, 3, 9, 10, 0, 0, 1, 5, 4, 3):
        assert np.array_equal(prefetcher.get(step)[0], loader.batch(step)[0]), step
    prefetcher.close()


class Counting:
    """A loader that counts its batches and breaks at one of them."""

    def __init__(self, breaks_at: int = -1) -> None:
        self.made = 0
        self.breaks_at = breaks_at

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        if step == self.breaks_at:
            raise DataError(f"the disk with step {step} is gone")
        self.made += 1
        return np.zeros((1, 1, 1, 1), np.float32), np.zeros(1, np.int32)


def test_it_works_a_bounded_number_of_batches_ahead() -> None:
    loader = Counting()
    prefetcher = Prefetcher(loader, depth=2)  # type: ignore[arg-type]
    time.sleep(0.1)
    assert loader.made <= 3  # two that wait, and one in hand
    prefetcher.close()


def test_an_error_is_raised_where_the_batch_is_asked_for() -> None:
    prefetcher = Prefetcher(Counting(breaks_at=2))  # type: ignore[arg-type]
    prefetcher.get(0)
    prefetcher.get(1)
    with pytest.raises(DataError, match="step 2 is gone"):
        prefetcher.get(2)


def test_closing_wakes_whoever_waits() -> None:
    class Slow(Counting):
        def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
            time.sleep(0.3)
            return super().batch(step)

    prefetcher = Prefetcher(Slow())  # type: ignore[arg-type]
    raised: list[str] = []

    def wait() -> None:
        try:
            for step in itertools.count():
                prefetcher.get(step)
        except RunError as error:
            raised.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.05)
    prefetcher.close()
    waiter.join(PATIENCE_S)
    assert not waiter.is_alive() and raised and "closed" in raised[0]
