"""What targets have to be, as numpy arrays of the data. No jax."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from stages.arrays import HostArray
from stages.errors import StageError

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The target of a position that does not count.
MASKED = -1


class TargetRule:
    """What the targets of a task have to be. This one accepts anything.

    A rule is asked twice: for the values when data are admitted, and for shapes when the model is
    known.
    """

    #: Whether targets are class numbers, of which the model needs to know how many there are.
    counts_classes = False
    #: Whether targets may be a dict of arrays.
    takes_dict = True
    #: Target of a position that the loss leaves out; None: the loss counts all positions.
    padding: float | None = None

    def admit(self, targets: HostArray, where: str) -> HostArray:
        """Returns targets as they are trained on.

        Args:
          targets: [samples, …].
          where: Their source, for the message.

        Raises:
          StageError: They are not valid.
        """
        return targets

    def width(self, targets: HostArray, classes: int) -> int:
        """Returns how long the last axis of the outputs has to be for such targets.

        Args:
          targets: [samples, …], admitted.
          classes: The configured number; 0 if none is.
        """
        return classes or 1

    def objection(self, targets: HostArray, width: int) -> str | None:
        """Returns what is wrong with targets for outputs whose last axis is ``width``, or None."""
        return None

    def like(self, outputs: Sequence[int]) -> tuple[tuple[int, ...], str] | None:
        """Returns what targets of one sample have to be; None if anything will do.

        Args:
          outputs: Shape of the outputs of one sample.

        Returns:
          Their shape, and the kind of their dtype: ``i`` for whole numbers, ``f`` for others.
        """
        return None


@dataclasses.dataclass(frozen=True)
class AnyTargets(TargetRule):
    """Anything: a task of the user's own, whose loss alone knows.

    Attributes:
      padding: Target of a position that the loss leaves out; None: it counts all positions.
    """

    padding: float | None = None


@dataclasses.dataclass(frozen=True)
class ClassTargets(TargetRule):
    """Class numbers from 0, [samples, …], one for each vector of outputs.

    Attributes:
      masked: Whether MASKED stands for a position that does not count.
    """

    masked: bool = False
    counts_classes = True
    takes_dict = False

    @property
    def padding(self) -> float | None:  # type: ignore[override]
        """MASKED if it stands for anything."""
        return MASKED if self.masked else None

    def admit(self, targets: HostArray, where: str) -> HostArray:
        """Returns them as int32; a last axis of size 1 behind the samples is dropped."""
        squeezed = targets.ndim == 2 and targets.shape[1] == 1 and not self.masked
        labels = np.squeeze(targets, axis=1) if squeezed else targets
        if labels.ndim < 1 or labels.dtype.kind not in "iu":
            raise StageError(
                f"{where}: labels must be [samples, …] whole numbers, one per sample or position, "
                f"got shape {labels.shape} of {labels.dtype}"
            )
        if labels.size and (lowest := int(labels.min())) < (MASKED if self.masked else 0):
            mask = f"; {MASKED} stands for positions that do not count" if self.masked else ""
            raise StageError(f"{where}: label {lowest} is negative: labels start at 0{mask}")
        if labels.size and int(labels.max()) > np.iinfo(np.int32).max:
            raise StageError(f"{where}: label {int(labels.max())} exceeds 32 bits")
        return labels.astype(np.int32, copy=False)

    def width(self, targets: HostArray, classes: int) -> int:
        """Returns the number of classes."""
        return classes or int(targets.max(initial=0)) + 1

    def objection(self, targets: HostArray, width: int) -> str | None:
        """See ``TargetRule``."""
        lowest = MASKED if self.masked else 0
        if targets.size and not (targets.min() >= lowest and targets.max() < width):
            wrong = targets[(targets < lowest) | (targets >= width)].flat[0]
            return f"label {int(wrong)}, expected {lowest} to {width - 1}"
        return None

    def like(self, outputs: Sequence[int]) -> tuple[tuple[int, ...], str]:
        """See ``TargetRule``."""
        return tuple(outputs[:-1]), "i"


@dataclasses.dataclass(frozen=True)
class NumberTargets(TargetRule):
    """Finite numbers, one for each output; a last axis of size 1 may be left out.

    Attributes:
      binary: Whether they have to lie in [0, 1], with 0 and 1 for no and yes.
      single: Whether a sample has one.
    """

    binary: bool = False
    single: bool = False
    takes_dict = False

    def admit(self, targets: HostArray, where: str) -> HostArray:
        """Returns them as float32, [samples] as [samples, 1]."""
        if targets.ndim < 1 or targets.dtype.kind not in "biuf":
            raise StageError(
                f"{where}: targets must be [samples, …] numbers, got shape {targets.shape} of "
                f"{targets.dtype}"
            )
        with np.errstate(over="ignore"):
            made = targets.astype(np.float32, copy=False)
        made = made[:, None] if made.ndim == 1 else made
        if self.single and made.shape[1:] != (1,):
            raise StageError(
                f"{where}: targets must be [samples] or [samples, 1], got shape {targets.shape}: "
                "with several labels the task is multilabel"
            )
        if (reason := self.objection(made, made.shape[-1])) is not None:
            raise StageError(f"{where}: {reason}")
        return made

    def width(self, targets: HostArray, classes: int) -> int:
        """Returns the number of values of a sample or position."""
        return int(targets.shape[-1]) if targets.ndim > 1 else 1

    def objection(self, targets: HostArray, width: int) -> str | None:
        """See ``TargetRule``."""
        if not np.isfinite(targets).all():
            return "a target is not finite: clean the data"
        if self.binary and targets.size and not (targets.min() >= 0 and targets.max() <= 1):
            wrong = targets[(targets < 0) | (targets > 1)].flat[0]
            return f"target {wrong:g}, expected 0 or 1: a task with more classes is classification"
        return None

    def like(self, outputs: Sequence[int]) -> tuple[tuple[int, ...], str]:
        """See ``TargetRule``."""
        return tuple(outputs), "f"
