"""Writes the weights of a run in Flax's own form, for use without this project.

  pipar export runs/digits --output=digits.msgpack

RUN is the folder of a run, one of its checkpoints, or a safetensors file with keys unit/path. The
file holds nested dictionaries: for each unit the variables of its module by path, frozen ones
included, without personal weights (aggregation.personal), which are each device's own. What is
missing is told.
flax.serialization.msgpack_restore reads it, and flax.nnx.replace_by_pure_dict puts a unit's
dictionary into the state of the module that the unit is.
"""

import os
import pathlib
from typing import Any

from pipar_jax.config.checkpoints import CHECKPOINTS
from pipar_jax.disk import files
from pipar_jax.errors import ConfigError
from pipar_jax.launch import plain_flags
from pipar_jax.launch.binary import wrong_use

_OUTPUT = plain_flags.define_path(
    "output",
    None,
    "File to write; by default NAME.msgpack here, with the run's name, numbered if it is taken.",
)


def name_of(run: pathlib.Path) -> str:
    """Returns the name of what is exported: a run's, with a checkpoint's rounds, or a file's."""
    path = pathlib.Path(os.path.abspath(run))  # . has no name of its own
    if path.parent.name == CHECKPOINTS:
        return f"{path.parent.parent.name}-{path.name}"
    return path.stem if os.path.isfile(path) else path.name


def main(names: list[str]) -> None:
    """Writes the weights of the run named on the command line.

    Raises:
      ConfigError: Not one run is named, its weights cannot be read, or the file cannot be written.
      DiskError: Writing the file failed.
    """
    if len(names) != 1:
        raise ConfigError(f"name one run's folder, such as runs/digits, not {len(names)}")
    run = plain_flags.as_path(names[0])
    target = _OUTPUT.value or files.unused(".", name_of(run), ".msgpack")
    files.check_target(target, f"--output={target}")
    from flax import serialization

    from pipar_jax.roles.whole_weights import whole_weights

    tree: dict[str, Any] = {}
    with wrong_use():
        found = whole_weights(run)
    for name, array in found.tensors.items():
        *groups, last = name.split("/")
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = array
    packed: bytes = serialization.msgpack_serialize(tree)
    files.write_bytes(target, packed, "choose another file with --output")
    print(f"wrote {len(tree)} units to {target}")
    if found.personal:
        print(f"without {', '.join(found.personal)}: personal weights are each device's own")
    if found.lacking:
        print(f"without {found.lacking}")


if __name__ == "__main__":
    plain_flags.run(main, takes="RUN")
