"""The configured task, and the scores by which a run is judged."""

from __future__ import annotations

from pipar_jax.config import plugins
from pipar_jax.config.run_fields import CheckpointConfig, StopConfig
from pipar_jax.config.schema import did_you_mean
from pipar_jax.config.training_fields import TaskConfig
from pipar_jax.errors import ConfigError, RunError
from stages.errors import StageError
from stages.names import TASKS
from stages.tasks import registry
from stages.tasks.task import Task


def make_task(config: TaskConfig) -> Task:
    """Returns the configured task; a function of the user's is called.

    Raises:
      ConfigError: Name, arguments or metrics are not valid.
      RunError: The user's function cannot be found, fails, or returns no task.
    """
    plugins.check_named(config.name, "task.name", "a task", TASKS)
    plugins.check_pairs(config.args, "task.args")
    if plugins.is_own(config.name):
        task = _own_task(config)
    else:
        arguments = plugins.read_args(config.args)
        try:
            task = registry.make_task(config.name, **arguments)
        except StageError as error:
            raise ConfigError(f"task.args={config.args[:120]!r} does not fit: {error}") from error
    names = [name for name in config.metrics.replace(",", " ").split() if name]
    try:
        return registry.choosing(task, names)
    except StageError as error:
        raise ConfigError(f"task.metrics={config.metrics[:120]!r} does not fit: {error}") from error


def _own_task(config: TaskConfig) -> Task:
    """Returns the task that the user's function makes."""
    what = f"own task {config.name}"
    made = plugins.make(config.name, what, RunError, args=config.args, field="task.args", facts={})
    if not isinstance(made, Task):
        raise RunError(f"{what} returned {type(made).__name__}, expected a stages.Task")
    return made


def check_task(config: TaskConfig, stop: StopConfig, checkpoint: CheckpointConfig) -> None:
    """Checks the fields of the task as far as no function of the user's has to be called.

    Args:
      config: The task.
      stop: Names a score that may end the run.
      checkpoint: Names a score by which a checkpoint is the best.

    Raises:
      ConfigError: A field is not valid.
    """
    if plugins.is_own(config.name):
        plugins.check_pairs(config.args, "task.args")
    else:
        check_scores(stop, checkpoint, make_task(config))


def check_scores(stop: StopConfig, checkpoint: CheckpointConfig, task: Task) -> None:
    """Checks that the scores by which a run is judged are those of its task.

    Raises:
      ConfigError: The task has no such score, or it never has such a value.
    """
    for field, name in (
        ("stop.metric", stop.metric), ("checkpoint.best", checkpoint.best)
    ):  # fmt: skip
        if name and name not in task.scores:
            raise ConfigError(
                f"{field}={name[:120]!r} is not a score of task "
                f"{task.name!r}{did_you_mean(name, task.scores)} (known: "
                f"{', '.join(task.scores)}; add those that need all outputs by task.metrics)"
            )
    score, target = stop.metric or task.main, stop.target
    if target is not None and score in task.shares and not 0 <= target <= 1:
        raise ConfigError(
            f"stop.target={target:g} is never reached: {score} of task {task.name!r} is a share "
            "between 0 and 1; write 0.95 for 95 %"
        )
