"""Where a run's checkpoints are, which of them can be read, and what a run may resume."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from pipar_jax.config.fields import Config
from pipar_jax.config.run_fields import RunConfig
from pipar_jax.config.saved import from_dict, resume_difference
from pipar_jax.disk.files import describe_reading
from pipar_jax.errors import ConfigError

#: The folder of a run's checkpoints in the run's own, and that of hosts' optimiser states.
CHECKPOINTS, HOST_STATES = "checkpoints", "hosts"
#: The items of a checkpoint: arrays, and the facts that go with them, as JSON.
STATE, FACTS = "state", "facts"
#: The file with a run's weights, in its folder, and of a device's personal ones, in its own.
WEIGHTS, PERSONAL = "weights.safetensors", "personal.safetensors"


@dataclasses.dataclass(frozen=True)
class Resumed:
    """The folder of a run that goes on.

    Attributes:
      folder: The run's folder.
      newest: The newest checkpoint that may be taken; None for any.
      required: Whether there must be one.
    """

    folder: Path
    newest: int | None
    required: bool


def resumed(name: str, run: RunConfig) -> Resumed | None:
    """Returns what ``run.resume`` names, or None for a run that starts afresh.

    Args:
      name: The run's name.
      run: The fields of ``run``.
    """
    if not run.resume:
        return None
    if run.resume == "auto":
        return Resumed(Path(run.dir) / name, None, required=False)
    path = Path(run.resume)
    if path.parent.name == CHECKPOINTS and path.name.isdigit():
        return Resumed(path.parent.parent, int(path.name), required=True)
    return Resumed(path.parent if path.name == CHECKPOINTS else path, None, required=True)


def state_folders(name: str, run: RunConfig, host: str) -> list[Path]:
    """Returns where a host keeps its own states, and then where it may find others."""
    folders = [Path(run.dir) / name]
    if (wanted := resumed(name, run)) is not None:
        folders.append(wanted.folder)
    return [folder / HOST_STATES / host for folder in dict.fromkeys(folders)]


def goes_on(config: Config) -> bool:
    """Returns whether a run goes on from a checkpoint, and does not begin.

    Args:
      config: Resolved configuration.
    """
    wanted = resumed(config.name, config.run)
    return wanted is not None and bool(_takeable(wanted))


def _takeable(wanted: Resumed) -> list[int]:
    """Returns the rounds of the checkpoints that may be taken, rising."""
    return [n for n in rounds_kept(wanted.folder) if n <= (wanted.newest or n)]


def rounds_kept(folder: Path) -> list[int]:
    """Returns the rounds after which a run has checkpoints that were written to their end, rising.

    Args:
      folder: The run's folder.
    """
    if not os.path.isdir(folder / CHECKPOINTS):  # or this user may not look
        return []
    files = (folder / CHECKPOINTS).glob("*/_CHECKPOINT_METADATA")
    return sorted(int(file.parent.name) for file in files if file.parent.name.isdigit())


def weights_of(path: Path, said: str) -> tuple[Path, int | None]:
    """Returns where weights to start from are.

    Args:
      path: The folder of a run, one of its checkpoints, or a file.
      said: What the message calls it.

    Returns:
      A file of weights and None, or the folder of a run and the rounds of its checkpoint.

    Raises:
      ConfigError: There are no weights.
    """
    if os.path.isfile(path):
        return path, None
    if os.path.isfile(path / WEIGHTS):
        return path / WEIGHTS, None
    if path.parent.name == CHECKPOINTS and path.name.isdigit() and os.path.isdir(path):
        return path.parent.parent, int(path.name)
    if kept := rounds_kept(path):
        return path, kept[-1]
    what = "has no weights to start from" if os.path.exists(path) else "is not there"
    raise ConfigError(
        f"{said} {what}: name the folder of a run with {WEIGHTS} or a "
        "checkpoint in it, one of its checkpoints, or a safetensors file"
    )


def read_facts(folder: Path, rounds: int) -> dict[str, Any]:
    """Returns the facts of a checkpoint, without its arrays.

    Args:
      folder: The run's folder.
      rounds: Number of completed rounds.

    Raises:
      ConfigError: It cannot be read.
    """
    path = folder / CHECKPOINTS / str(rounds) / FACTS / "metadata"
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {describe_reading(error)}") from error
    if not isinstance(facts, dict) or "config" not in facts:
        raise ConfigError(f"{path} cannot be read: it has no field 'config'")
    return facts


def check_resume(config: Config) -> None:
    """Refuses to resume what is not there, or what this configuration does not continue.

    Args:
      config: Resolved configuration.

    Raises:
      ConfigError: There is no checkpoint, or it differs in a field in which it must not.
    """
    wanted = resumed(config.name, config.run)
    if wanted is None:
        return
    kept = _takeable(wanted)
    if not kept or wanted.newest not in (None, *kept):
        if wanted.required:
            raise ConfigError(
                f"run.resume={config.run.resume!r}: there is no checkpoint of a run; name the "
                "folder of a run that was trained with checkpoint.every_rounds or "
                "checkpoint.every_s, or write run.resume=auto to begin anew where there is none"
            )
        return
    unread: list[str] = []
    for rounds in reversed(kept):
        try:
            facts = read_facts(wanted.folder, rounds)
        except ConfigError as error:
            unread.append(str(error))
            continue  # an older one may be readable; restoring reports it
        check_continues(config, facts, f"{wanted.folder / CHECKPOINTS / str(rounds)}")
        _check_longer(config, facts, wanted.folder)
        return
    raise ConfigError(
        f"run.resume={config.run.resume!r}: no checkpoint of {wanted.folder} can be read: "
        f"{'; '.join(unread)[:1000]}; begin a new run, with another name or in another run.dir"
    )


def _check_longer(config: Config, facts: dict[str, Any], folder: Path) -> None:
    """Refuses a run that is over, unless it is to become longer, or is to end for another reason.

    Raises:
      ConfigError: It is not; the message says how long it was, or why it has ended.
    """
    before = from_dict(facts["config"])
    field = "run.rounds" if before.run.rounds else "epochs"
    done, now = ((one.run.rounds if before.run.rounds else one.epochs) for one in (before, config))
    another = "or start another run from its weights with --config.model.weights"
    if config.epochs > before.epochs or config.run.rounds > before.run.rounds:
        return
    if facts["finished"]:
        raise ConfigError(
            f"{folder} is finished, with {field}={done} ({facts['rounds']} rounds), and this run "
            f"has {field}={now}: raise {field} above {done} to go on with it, {another}"
        )
    if (reason := facts.get("stopped")) is not None and config.stop == before.stop:
        raise ConfigError(
            f"{folder} has ended after {facts['rounds']} rounds, since {reason}: change what has "
            f"ended it (such as stop.*), or raise {field} above {done}, to go on with it, {another}"
        )


def check_continues(config: Config, facts: dict[str, Any], where: str) -> None:
    """Refuses a checkpoint that a configuration does not continue.

    Raises:
      ConfigError: It names each field that differs and must not.
    """
    differing = resume_difference(config, from_dict(facts["config"]))
    if differing:
        raise ConfigError(
            f"{where} cannot be resumed with another {', '.join(differing)}: give the same, begin "
            "a new run, or start one from its weights with --config.model.weights"
        )
