"""Mini-batches of one device: shuffled, augmented and normalised, a function of the step alone."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipar_jax.data.types import Split, normalise
from pipar_jax.errors import DataError, RunError
from pipar_jax.schedule import actions

Batch = tuple[NDArray[np.float32], NDArray[np.int32]]

#: Pixels by which crop_flip shifts an image at most, in each direction.
PADDING = 4
#: Keeps the draws of augmentation apart from those of the shuffle.
_AUGMENT_STREAM = 1


def steps_per_epoch(samples: int, batch_size: int, drop_last: bool) -> int:
    """Returns how many mini-batches an epoch of a device has.

    Raises:
      DataError: None, because the only mini-batch is ragged and left out.
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

    An epoch's order comes from ``SeedSequence((seed, device, epoch))``; what augmentation does to
    a sample comes from the sample's place in the shard, so neither micro-batches nor the order
    in which batches are asked for change it.

    Attributes:
      samples: Samples of the shard.
      samples_per_epoch: Samples of an epoch's mini-batches; fewer if a ragged one is left out.
      steps_per_epoch: Mini-batches of an epoch.
    """

    def __init__(
        self,
        split: Split,
        indices: NDArray[np.intp] | None,
        batch_size: int,
        *,
        seed: int,
        device: int,
        augment: str = "none",
        mean: NDArray[np.float32] | float = 0.0,
        std: NDArray[np.float32] | float = 1.0,
        drop_last: bool = False,
    ) -> None:
        """Prepares the mini-batches of some samples.

        Args:
          split: Images and labels.
          indices: [samples] positions of this device's samples in the split; None for all.
          batch_size: Samples of a mini-batch.
          seed: The run's root seed.
          device: The device's index.
          augment: ``none`` or ``crop_flip``.
          mean: [channels] or a number, subtracted, in units of the stored images.
          std: [channels] or a number, divided by.
          drop_last: Whether the ragged last mini-batch of an epoch is left out.

        Raises:
          DataError: An epoch has no mini-batch.
        """
        self._split = split
        self._indices = np.arange(len(split)) if indices is None else np.asarray(indices, np.intp)
        self._batch_size = batch_size
        self._seed = (seed, device)
        self._augment = augment == "crop_flip"
        channels = split.images.shape[-1]
        self._mean = np.broadcast_to(np.asarray(mean, np.float32), (channels,))
        self._std = np.broadcast_to(np.asarray(std, np.float32), (channels,))
        self._order = (-1, self._indices)
        self._draws = (-1, self._indices[:, None])
        self.samples = len(self._indices)
        self.steps_per_epoch = steps_per_epoch(self.samples, batch_size, drop_last)
        whole = self.steps_per_epoch * batch_size
        self.samples_per_epoch = whole if drop_last else self.samples

    def batch_samples(self, step: int) -> int:
        """Returns the size of a step's mini-batch without making it."""
        return actions.batch_samples(self.samples_per_epoch, self._batch_size, step)

    def batch(self, step: int) -> Batch:
        """Returns a step's mini-batch.

        Args:
          step: Step of this device since the run began.

        Returns:
          [samples, height, width, channels] float32 and [samples] int32, both fresh arrays.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self._batch_size
        places = self._shuffled(epoch)[first : first + self._batch_size]
        positions = self._indices[places]
        images = self._split.images[positions]
        if self._augment:
            images = crop_flip(images, self._drawn(epoch)[places])
        return normalise(images, self._mean, self._std), self._split.labels[positions]

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


def crop_flip(images: NDArray[Any], draws: NDArray[np.intp]) -> NDArray[Any]:
    """Returns images shifted by up to PADDING pixels, zeros moving in, and perhaps mirrored.

    The augmentation of the PiPar paper's CIFAR runs: pad by four, crop at random, flip at random.

    Args:
      images: [samples, height, width, channels].
      draws: [samples, 3]: first row and first column of the crop in the padded image, and whether
        it is mirrored.
    """
    count, height, width, channels = images.shape
    padded = np.zeros((count, height + 2 * PADDING, width + 2 * PADDING, channels), images.dtype)
    padded[:, PADDING : PADDING + height, PADDING : PADDING + width] = images
    made = np.empty_like(images)
    # A loop over slices: three times as fast as one indexing by arrays of rows and columns.
    for i, (top, left, mirror) in enumerate(draws.tolist()):
        crop = padded[i, top : top + height, left : left + width]
        made[i] = crop[:, ::-1] if mirror else crop
    return made


class Prefetcher:
    """Makes the next mini-batches on a thread of its own while a step computes.

    It works ``depth`` mini-batches ahead and then sleeps, so that on a device pinned to one core
    it takes only the time that its batches take.
    """

    def __init__(self, loader: Loader, first_step: int = 0, depth: int = 2) -> None:
        """Starts making mini-batches.

        Args:
          loader: Where they come from; nobody else may use it meanwhile.
          first_step: Step of the first one.
          depth: How many are kept ready.
        """
        self._loader = loader
        self._next = first_step
        self._turn: int | None = None  # the step to go on with, if it is not the next one
        self._ready: queue.Queue[tuple[int, Batch | Exception]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(first_step,), name="pipar-prefetch", daemon=True
        )
        self._thread.start()

    def get(self, step: int) -> Batch:
        """Returns the mini-batch of a step.

        Steps come one after another, so that they are ready; where a round was undone or missed,
        any other step is made when it is asked for, and those behind it.

        Raises:
          RunError: The prefetcher is closed.
          DataError: A mini-batch could not be made; so do other errors of the loader.
        """
        if step != self._next:
            self._turn = step
        while not self._closed.is_set():
            of, made = self._ready.get()
            if of != step:
                continue  # made before the turn
            if isinstance(made, Exception):
                self.close()
                raise made
            self._next = step + 1
            return made
        raise RunError(f"mini-batch of step {step} asked of a prefetcher that is closed")

    def close(self) -> None:
        """Ends the thread. Idempotent."""
        self._closed.set()
        while self._thread.is_alive():  # it may be waiting for room
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
            except Exception as error:  # handed to whoever waits in get, and raised there
                made = error
            self._ready.put((step, made))
            step += 1
