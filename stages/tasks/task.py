"""A task as a value: the loss of each sample, the metrics, and what targets have to be.

Making a task loads no jax, so that a launcher can check a configuration against it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from stages.errors import StageError
from stages.foreign import describe
from stages.tasks.targets import AnyTargets, TargetRule

if TYPE_CHECKING:
    import jax

    from stages.arrays import HostArray
    from stages.trees import Targets

#: The name under which every task reports its mean loss.
LOSS = "loss"
#: The most metrics of a task: their sums travel with every report of a host.
MOST_METRICS = 64
#: What the name of a metric has to look like.
METRIC_NAME = r"[A-Za-z][\w.@-]{0,39}"

Outputs: TypeAlias = "jax.Array"
"""What the last unit returns, [samples, …]."""
Values: TypeAlias = "jax.Array | tuple[jax.Array, jax.Array]"
"""A metric's values [samples], or their numerators and denominators, each [samples]."""


def _same(mean: float) -> float:
    """Returns its argument."""
    return mean


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric that is a function of a mean over samples, and so can be streamed.

    Hosts add up numerators and denominators of their micro-batches; nothing depends on how samples
    are divided among micro-batches, devices or rounds.

    Attributes:
      name: Its name.
      values: Returns the samples' values, whose mean counts, or their numerators and denominators,
        of which the sum of the ones over the sum of the others does (values ``v`` of weights ``w``:
        ``(w * v, w)``); traced by jax. A sample's value may depend on that sample alone.
      higher_is_better: Whether higher values are better.
      share: Whether it is a share in [0, 1], which is shown as a percentage.
      finish: What is reported of the mean, such as ``math.sqrt``.
    """

    name: str
    values: Callable[[Outputs, Targets], Values]
    higher_is_better: bool = True
    share: bool = False
    finish: Callable[[float], float] = _same


@dataclasses.dataclass(frozen=True)
class WholeMetric:
    """A metric that needs all outputs at once, computed in evaluations only.

    Attributes:
      name: Its name.
      compute: Returns a number, or a table (an array) from all outputs and all targets, both
        numpy arrays [samples, …].
      higher_is_better: Whether higher values are better; None for a table.
      share: Whether it is a share in [0, 1].
    """

    name: str
    compute: Callable[[HostArray, Any], Any]
    higher_is_better: bool | None = True
    share: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """What a model is trained for.

    Attributes:
      name: Its name.
      loss: Returns the loss of each sample, [samples] of a floating dtype, from outputs
        [samples, …] and targets. Traced by jax. The engine takes the mean over the samples of the
        mini-batch, however that is divided; so a sample's loss may depend on that sample alone.
      metrics: Metrics that stream, the most telling one first.
      whole: Metrics of all outputs, computed in evaluations.
      targets: What targets have to be.
      answer: Turns outputs [samples, …] into predictions, as ``Run.predict`` returns them.
    """

    name: str
    loss: Callable[[Outputs, Targets], jax.Array]
    metrics: tuple[Metric, ...] = ()
    whole: tuple[WholeMetric, ...] = ()
    targets: TargetRule = dataclasses.field(default_factory=AnyTargets)
    answer: Callable[[HostArray], HostArray] = lambda outputs: outputs

    def __post_init__(self) -> None:
        """Checks the types of the attributes, and the names of the metrics.

        Raises:
          StageError: An attribute has another type; a name is not valid, or there twice, or there
            are too many.
        """
        self._check_types()
        names = [metric.name for metric in self.named]
        for name in names:
            if not isinstance(name, str) or not re.fullmatch(METRIC_NAME, name) or name == LOSS:
                raise StageError(
                    f"task {self.name!r}: {name!r} is not a valid name of a metric: use at most 40 "
                    f"letters, digits and _ . @ -, a letter first, and not {LOSS!r}"
                )
            if names.count(name) > 1:
                raise StageError(f"task {self.name!r} has two metrics named {name!r}: rename one")
        if len(names) > MOST_METRICS:
            raise StageError(
                f"task {self.name!r} has {len(names)} metrics, at most {MOST_METRICS} are allowed"
            )

    def _check_types(self) -> None:
        """Checks what is in place of metrics and targets, where mistakes are easily made."""
        for field, kind in (("metrics", Metric), ("whole", WholeMetric)):
            value = getattr(self, field)
            if not isinstance(value, tuple | list) or not all(isinstance(m, kind) for m in value):
                got = type(value).__name__
                if isinstance(value, tuple | list):
                    got += f" of {', '.join(type(metric).__name__ for metric in value)}"
                raise StageError(
                    f"task {self.name!r}: {field} is a {got}, expected a tuple of "
                    f"stages.{kind.__name__}, such as ({kind.__name__}(…),)"
                )
        if not isinstance(self.targets, TargetRule):
            raise StageError(
                f"task {self.name!r}: targets is a {type(self.targets).__name__}, expected a rule, "
                'such as stages.make_task("classification").targets, or nothing'
            )

    @property
    def named(self) -> tuple[Metric | WholeMetric, ...]:
        """All metrics."""
        return (*self.metrics, *self.whole)

    @property
    def is_registered(self) -> bool:
        """Whether its loss is one of ours, of which much is known."""
        return self.loss.__module__ == "stages.tasks.registered"

    @property
    def streamed(self) -> tuple[str, ...]:
        """Names of the metrics that stream."""
        return tuple(metric.name for metric in self.metrics)

    @property
    def scores(self) -> dict[str, bool]:
        """Whether higher is better, by name, for the loss and every metric that is a number."""
        better = {metric.name: metric.higher_is_better for metric in self.metrics}
        for whole in self.whole:
            if whole.higher_is_better is not None:
                better[whole.name] = whole.higher_is_better
        return {**better, LOSS: False}

    @property
    def shares(self) -> tuple[str, ...]:
        """Names of the metrics that are shares in [0, 1]."""
        return tuple(metric.name for metric in self.named if metric.share)

    @property
    def main(self) -> str:
        """Name of the most telling score: the first metric that streams, else the loss."""
        return next(iter(self.scores))

    def finish(self, sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """Returns the streamed metrics from their sums.

        Args:
          sums: For each metric the sum of its numerators, and that of its denominators.

        Returns:
          The metrics by name; NaN where the latter is zero, such as without a single position
          that counts, or where a sum is NaN.

        Raises:
          StageError: A metric's ``finish`` failed, or returned something else than a number.
        """
        values: dict[str, float] = {}
        for metric in self.metrics:
            total, weight = sums.get(metric.name, (0.0, 0.0))
            mean = total / weight if weight else math.nan
            # A ``finish`` may fail for NaN, and the infinite sums of two hosts may cancel.
            values[metric.name] = mean if math.isnan(mean) else self._finished(metric, mean)
        return values

    def _finished(self, metric: Metric, mean: float) -> float:
        """Returns what a metric reports of its mean; infinity where that is too large a number."""
        what = f"task {self.name!r}: finish of the metric {metric.name!r}"
        try:
            value = metric.finish(mean)
        except OverflowError:  # the perplexity of a training that diverges
            return math.inf
        except Exception as error:
            raise StageError(f"{what} failed for the mean {mean:g}: {describe(error)}") from error
        try:
            return float(value)
        except (TypeError, ValueError):
            raise StageError(
                f"{what} returned a {type(value).__name__}, expected a number"
            ) from None

    def facts(self) -> dict[str, Any]:
        """Returns what reports need to know of the scores, JSON-ready."""
        shares = set(self.shares)
        return {
            "name": self.name,
            "main": self.main,
            "scores": {
                name: {"better": "higher" if higher else "lower", "share": name in shares}
                for name, higher in self.scores.items()
            },
        }
