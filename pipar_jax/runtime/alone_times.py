"""How long a host's computations take alone, and how long they last when it is emulated slower."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from pipar_jax.config.slowdown import Slowdown
from pipar_jax.schedule.actions import UPDATE, ActionKind
from pipar_jax.training.compile import LEAST_S, REPEATS, Shape, Told, run_all, units_of
from pipar_jax.training.replica import Replica
from stages import Model


class AloneTimes:
    """Times of a host's compiled functions, all else idle.

    Args:
      slowdown: Emulated slowness: computations last so many times their time alone.
    """

    def __init__(self, slowdown: Slowdown) -> None:
        self._slowdown = slowdown
        self._began_s: float | None = None
        self._alone_s: dict[Shape, float] = {}

    def begin(self) -> None:
        """Starts the clock of a slowness that varies; the first call counts."""
        if self._began_s is None:
            self._began_s = time.monotonic()

    @property
    def factor(self) -> float:
        """By what the time of a computation is multiplied now."""
        return self._slowdown.since(self._began_s)

    def measure(
        self,
        model: Model,
        replicas: Collection[Replica],
        sizes: Collection[int],
        *,
        between: Callable[[], None],
        told: Told,
    ) -> None:
        """Times what has not been timed yet.

        Args:
          model: The whole model.
          replicas: The host's replicas.
          sizes: Sizes of its micro-batches.
          between: Called between stages, to detect that they are no longer wanted.
          told: Receives how much is done.
        """
        known = {(shape.units, shape.samples) for shape in self._alone_s}
        new = [
            replica for replica in replicas
            if any((units_of(replica), size) not in known for size in sizes)
        ]  # fmt: skip
        # The least, not the median: other work on this machine only ever adds to it, and what is
        # added here would be multiplied by the slowness that is emulated.
        self._alone_s.update(
            run_all(
                model, new, sizes, between=between, told=told, repeats=REPEATS, least_s=LEAST_S,
                summary=min,
            )
        )  # fmt: skip

    def duration_s(
        self, replica: Replica, kind: ActionKind, samples: int, length: int | None
    ) -> float:
        """Returns the seconds a computation has to last; 0 where no slowness is emulated.

        Args:
          replica: The stage's weights.
          kind: The computation.
          samples: Samples in the micro-batch.
          length: What they are padded to; None if all samples are equally long.
        """
        if not self._slowdown.emulated:
            return 0.0
        shape = Shape(units_of(replica), kind, samples, length)
        if kind == UPDATE:
            shape = Shape(units_of(replica), kind, 0)
        return self.factor * self._alone(shape)

    def _alone(self, shape: Shape) -> float:
        """Returns the seconds of a computation at full speed.

        A device that joins later, or takes its turn in a place, may have micro-batches of a size
        that was not known when others were timed: their time is in proportion to the next size.
        """
        if shape in self._alone_s:
            return self._alone_s[shape]
        timed = sorted(
            (one.samples, seconds)
            for one, seconds in self._alone_s.items()
            if one._replace(samples=shape.samples) == shape
        )
        size, seconds = next((one for one in timed if one[0] >= shape.samples), timed[-1])
        return seconds * shape.samples / size
