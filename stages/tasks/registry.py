"""Makes a task by name from arguments, and chooses what is computed of it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from stages.errors import StageError
from stages.names import TASKS, check
from stages.tasks.registered import FACTORIES
from stages.tasks.task import Task

#: Stands for all metrics of all outputs.
ALL = "all"
#: The tasks made so far, by name and arguments.
_MADE: dict[tuple[str, str], Task] = {}


def make_task(name: str = "classification", /, **arguments: Any) -> Task:
    """Returns a registered task, the same one for the same arguments.

    Args:
      name: ``classification``, ``binary``, ``multilabel``, ``regression`` or ``language``.
      **arguments: Arguments of the task, see ``stages.tasks.registered``.

    Raises:
      StageError: The name is unknown, or an argument is not valid.
    """
    check("task", name, TASKS)
    known = inspect.signature(FACTORIES[name]).parameters
    if unknown := sorted(arguments.keys() - known.keys()):
        raise StageError(
            f"task {name!r} has no argument {unknown[0]!r} (known: {', '.join(known)})"
        )
    # By their text: True is not 1 here, and lists are allowed. Another thread may have been first.
    return _MADE.setdefault((name, repr(sorted(arguments.items()))), FACTORIES[name](**arguments))


def choosing(task: Task, names: Sequence[str]) -> Task:
    """Returns a task that computes some of its metrics of all outputs, and no others.

    Args:
      task: The task.
      names: Their names; ``all`` for all of them.

    Raises:
      StageError: The task has no such metric.
    """
    if ALL in names:
        return task
    known = {metric.name: metric for metric in task.whole}
    for name in names:
        if name not in known:
            raise StageError(
                f"task {task.name!r} has no metric {name!r} of all outputs (known: "
                f"{', '.join(known) or 'none'}); those that stream are always computed"
                f" ({', '.join(task.streamed) or 'none'})"
            )
    return dataclasses.replace(task, whole=tuple(known[name] for name in dict.fromkeys(names)))
