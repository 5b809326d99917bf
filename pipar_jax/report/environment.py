"""The environment of a run, in ``environment.json`` in its folder, without secrets."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pipar_jax
from pipar_jax.config import HIDDEN_TOKEN
from pipar_jax.disk import json_text
from pipar_jax.disk.files import write_text
from pipar_jax.disk.json_text import JsonMapping, JsonObject

ENVIRONMENT = "environment.json"
#: Libraries whose versions may affect the results of a run.
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "ml_dtypes", "safetensors")
_SECRET = re.compile(r"-{1,2}(?:no)?[\w.\-]*(?:token|secret|password|passphrase)[\w.\-]*", re.I)
#: Prefixes of values that refer to a secret without containing it.
_ELSEWHERE = ("env:", "file:")
_GIT_S = 5.0


def write(folder: Path, secret: str | None) -> None:
    """Writes the facts that are known before jax is loaded.

    Args:
      folder: The run's folder.
      secret: The run's token, which is hidden wherever it occurs.

    Raises:
      DiskError: The file cannot be written.
    """
    facts = {
        "pipar_jax": pipar_jax.__version__,
        "commit": commit(Path(pipar_jax.__file__).resolve().parents[1]),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "system": platform.platform(),
        "host": platform.node(),
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(hide(sys.orig_argv, secret)),
    }
    _write(folder, facts)


def add_platform(folder: Path) -> None:
    """Adds the accelerators of the server's jax to the file.

    Raises:
      DiskError: The file cannot be written.
    """
    import jax

    facts: JsonObject = {}
    with contextlib.suppress(OSError, ValueError):  # a server that was started without a folder
        facts = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    devices = jax.devices()
    facts["server"] = {
        "platform": devices[0].platform,
        "devices": [device.device_kind for device in devices],
    }
    _write(folder, facts)


def hide(arguments: Sequence[str], secret: str | None) -> list[str]:
    """Returns a command line with its secrets hidden.

    Args:
      arguments: The command line.
      secret: A text that is hidden wherever it occurs.
    """
    shown: list[str] = []
    value_follows = False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        secret_flag = _SECRET.fullmatch(flag) is not None
        if value_follows and not argument.startswith("-"):
            argument = _hidden(argument)
        elif secret_flag and equals:
            argument = f"{flag}={_hidden(value)}"
        value_follows = secret_flag and not equals
        shown.append(argument.replace(secret, HIDDEN_TOKEN) if secret else argument)
    return shown


def commit(root: Path) -> str | None:
    """Returns the commit of the sources, with ``-dirty`` if they have changes.

    Args:
      root: Folder of the sources; installed ones have no commit.
    """
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40",
               "--exclude=*"]  # fmt: skip
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, check=True)
        return done.stdout.strip() or None
    return None


def _hidden(value: str) -> str:
    return value if value.startswith(_ELSEWHERE) else HIDDEN_TOKEN


def _version(library: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(library)
    return None


def _write(folder: Path, facts: JsonMapping) -> None:
    write_text(folder / ENVIRONMENT, json_text.dumps(facts, indent=2) + "\n")
