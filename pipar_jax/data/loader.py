"""Mini-batches of a device: shuffled, augmented, normalised; a function of the step only."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import queue
import threading
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from comms.arrays import Array
from pipar_jax.data.augmentation import (
    CROP_FLIP,
    NO_AUGMENTATION,
    PADDING,
    Augment,
    augmented,
    crop_flip,
)
from pipar_jax.data.fingerprint import fingerprint
from pipar_jax.data.types import Examples, Padding, normalise
from pipar_jax.errors import DataError, RunError
from pipar_jax.schedule import actions
from stages.signature import INPUT

#: Separates the draws of augmentation from those of the shuffle.
_AUGMENT_STREAM = 1


class Batch(NamedTuple):
    """A mini-batch of a device; new arrays [samples, …].

    Attributes:
      x: The input that flows through the cuts: float32, or int32 if it is stored as whole numbers
        and not normalised.
      sides: Side inputs by name, as stored.
      targets: Targets by name, as stored.
    """

    x: Array
    sides: Mapping[str, Array]
    targets: Mapping[str, Array]


def steps_per_epoch(samples: int, batch_size: int, drop_last: bool) -> int:
    """Returns the number of mini-batches in an epoch of a device.

    Raises:
      DataError: There is none, because the only mini-batch is incomplete and dropped.
    """
    steps = samples // batch_size if drop_last else math.ceil(samples / batch_size)
    if not steps:
        raise DataError(
            f"a shard of {samples} samples has no full mini-batch of {batch_size}: lower "
            "data.batch_size or set data.drop_last=false"
        )
    return steps


class Loader:
    """The mini-batches of one device, each a deterministic function of (seed, device, step).

    The order of an epoch depends on ``SeedSequence((seed, device, epoch))``, augmentation of a
    sample on its position in the shard; neither depends on micro-batches or on the order of
    requests.

    Attributes:
      samples: Number of samples in the shard.
      samples_per_epoch: Number of samples in an epoch; fewer if an incomplete mini-batch is
        dropped.
      steps_per_epoch: Number of mini-batches in an epoch.
    """

    def __init__(
        self,
        examples: Examples,
        indices: NDArray[np.intp] | None,
        batch_size: int,
        *,
        seed: int,
        device: int,
        augment: str | Augment = NO_AUGMENTATION,
        mean: NDArray[np.float32] | float | None = None,
        std: NDArray[np.float32] | float | None = None,
        drop_last: bool = False,
        padding: Padding | None = None,
    ) -> None:
        """Creates the loader of a shard.

        Args:
          examples: Inputs and targets.
          indices: [samples] positions of this device's samples in the examples; None for all.
          batch_size: Samples per mini-batch.
          seed: The run's root seed.
          device: The device's index.
          augment: ``none``, ``crop_flip``, or a function of a sample's inputs and a random number
            generator.
          mean: [channels] or a number, subtracted, in units of the stored input; None: the input is
            not normalised.
          std: [channels] or a number, the divisor; None likewise.
          drop_last: Whether an incomplete last mini-batch of an epoch is dropped.
          padding: What mini-batches of samples of different lengths are padded to.

        Raises:
          DataError: An epoch has no mini-batch, or crop_flip is asked for what is no image.
        """
        count = len(examples)
        self._examples = examples
        self._indices = np.arange(count) if indices is None else np.asarray(indices, np.intp)
        self._batch_size = batch_size
        self._seed = (seed, device)
        self._augment = augment
        self._padding = padding
        if augment == CROP_FLIP and examples.x.ndim != 4:
            raise DataError(
                "data.augment=crop_flip is for images [samples, height, width, channels], and the "
                f"input is {list(examples.x.shape)}: set data.augment=none, or name a function of "
                "your own"
            )
        channels = examples.x.shape[-1:] if examples.x.ndim > 1 else ()
        self._mean, self._std = (
            None if one is None else np.broadcast_to(np.asarray(one, np.float32), channels)
            for one in (mean, std)
        )
        self._order = (-1, self._indices)
        self._draws = (-1, self._indices[:, None])
        self.samples = len(self._indices)
        self.steps_per_epoch = steps_per_epoch(self.samples, batch_size, drop_last)
        whole = self.steps_per_epoch * batch_size
        self.samples_per_epoch = whole if drop_last else self.samples

    def fingerprint(self) -> str:
        """Returns what tells the shard's samples from others."""
        whole = len(self._indices) == len(self._examples)
        return fingerprint(self._examples if whole else self._examples.take(self._indices))

    def batch_samples(self, step: int) -> int:
        """Returns the size of a step's mini-batch without loading it."""
        return actions.batch_samples(self.samples_per_epoch, self._batch_size, step)

    def length(self, step: int) -> int | None:
        """Returns the length of a step's mini-batch without loading it; None if all are alike."""
        if self._padding is None:
            return None
        lengths = self._examples.lengths
        assert lengths is not None, "samples of different lengths without their lengths"
        return self._padding.holding(int(lengths[self._indices[self._places(step)]].max()))

    def steps_by_length(self) -> dict[int, int]:
        """Returns how many mini-batches of the first epoch are padded to which length."""
        lengths = (self.length(step) for step in range(self.steps_per_epoch))
        return dict(collections.Counter(one for one in lengths if one is not None))

    def batch(self, step: int) -> Batch:
        """Returns the mini-batch of a step.

        Args:
          step: Step of this device since the start of the run.

        Raises:
          DataError: The user's augmentation failed, or returned other shapes.
        """
        epoch = step // self.steps_per_epoch
        places = self._places(step)
        examples = self._examples.take(self._indices[places])
        inputs = examples.inputs
        if self._augment == CROP_FLIP:
            inputs = {**inputs, INPUT: crop_flip(inputs[INPUT], self._drawn(epoch)[places])}
        elif callable(self._augment):
            inputs = augmented(inputs, self._augment, [(*self._seed, epoch, _AUGMENT_STREAM, place)
                                                       for place in places.tolist()])  # fmt: skip
        if self._padding is not None:  # what is drawn for a sample depends on no other
            examples = self._padding.padded(
                dataclasses.replace(examples, inputs=inputs), self.length(step)
            )
            inputs = examples.inputs
        x = normalise(inputs[INPUT], self._mean, self._std)
        sides = {name: one for name, one in inputs.items() if name != INPUT}
        return Batch(x, sides, examples.targets)

    def _places(self, step: int) -> NDArray[np.intp]:
        """Returns the places in the shard of a step's samples."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self._batch_size
        return self._shuffled(epoch)[first : first + self._batch_size]

    def _shuffled(self, epoch: int) -> NDArray[np.intp]:
        if self._order[0] != epoch:
            draw = np.random.default_rng(np.random.SeedSequence((*self._seed, epoch)))
            self._order = (epoch, draw.permutation(self.samples))
        return self._order[1]

    def _drawn(self, epoch: int) -> NDArray[np.intp]:
        if self._draws[0] != epoch:
            entropy = (*self._seed, epoch, _AUGMENT_STREAM)
            draw = np.random.default_rng(np.random.SeedSequence(entropy))
            high = (2 * PADDING + 1, 2 * PADDING + 1, 2)
            self._draws = (epoch, draw.integers(0, high, (self.samples, 3)))
        return self._draws[1]


class Prefetcher:
    """Loads the next mini-batches on a thread of its own while a step computes.

    It works ``depth`` mini-batches ahead and then sleeps, so that on a device pinned to one core it
    takes only the time of its batches.
    """

    def __init__(self, loader: Loader, first_step: int = 0, depth: int = 2) -> None:
        """Starts loading mini-batches.

        Args:
          loader: The loader, which must not be used elsewhere meanwhile.
          first_step: Step of the first mini-batch.
          depth: Number of mini-batches loaded ahead.
        """
        self._loader = loader
        self._next = first_step
        self._turn: int | None = None  # the step to continue with, if it is not the next one
        self._ready: queue.Queue[tuple[int, Batch | Exception]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(first_step,), name="pipar-prefetch", daemon=True
        )
        self._thread.start()

    def get(self, step: int) -> Batch:
        """Returns the mini-batch of a step.

        Consecutive steps are loaded ahead. After a round that was undone or missed, any other step
        is loaded on request, and its successors ahead.

        Raises:
          RunError: The prefetcher is closed.
          DataError: A mini-batch could not be loaded; other errors of the loader are raised as
            well.
        """
        if step != self._next:
            self._turn = step
        while not self._closed.is_set():
            of, made = self._ready.get()
            if of != step:
                continue  # loaded before the change
            if isinstance(made, Exception):
                self.close()
                raise made
            self._next = step + 1
            return made
        raise RunError(f"mini-batch of step {step} requested from a closed prefetcher")

    def close(self) -> None:
        """Ends the thread. Idempotent."""
        self._closed.set()
        while self._thread.is_alive():  # it may be waiting for space
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.005)
        with contextlib.suppress(queue.Full):  # for a get that waits in another thread
            self._ready.put_nowait((-1, RunError("the prefetcher was closed")))

    def _work(self, step: int) -> None:
        while not self._closed.is_set():
            if (turn := self._turn) is not None:
                step, self._turn = turn, None
            made: Batch | Exception
            try:
                made = self._loader.batch(step)
            except Exception as error:  # raised in get
                made = error
            self._ready.put((step, made))
            step += 1
