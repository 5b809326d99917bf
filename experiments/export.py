"""Writes the weights of a run in Flax's own form, for use without this project.

  pipar export runs/digits --output=digits.msgpack

RUN is the folder of a run, one of its checkpoints, or a safetensors file with keys unit/path. The
file holds nested dictionaries: for each unit the variables of its module by path, without personal
weights (aggregation.personal), which are each device's own.
flax.serialization.msgpack_restore reads it, and flax.nnx.replace_by_pure_dict puts a unit's
dictionary into the state of the module that the unit is.
"""

import pathlib
from typing import Any

from pipar_jax.disk import files
from pipar_jax.errors import ConfigError
from pipar_jax.launch import plain_flags

_OUTPUT = plain_flags.define_path("output", None, "File to write; by default weights.msgpack.")


def main(names: list[str]) -> None:
    """Writes the weights of the run named on the command line.

    Raises:
      ConfigError: Not one run is named.
      PiparError: The weights cannot be read, or the file cannot be written.
    """
    if len(names) != 1:
        raise ConfigError(f"name one run's folder, such as runs/digits, not {len(names)}")
    from flax import serialization

    from pipar_jax.roles.start_weights import load_tensors, personal_of

    tree: dict[str, Any] = {}
    run = pathlib.Path(names[0]).expanduser()
    for name, array in load_tensors(run).items():
        *groups, last = name.split("/")
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = array
    target = _OUTPUT.value or pathlib.Path("weights.msgpack")
    packed: bytes = serialization.msgpack_serialize(tree)
    files.write_bytes(target, packed, "choose another file with --output")
    print(f"wrote {len(tree)} units to {target}")
    if personal := personal_of(run):
        print(f"without {', '.join(personal)}: personal weights are each device's own")


if __name__ == "__main__":
    plain_flags.run(main, takes="RUN")
