"""Measures every unit on every host, and every link, and prints the figures as tables.

Nothing is trained. Hosts are measured on this machine, with the cores, the emulated slowdowns and
the links of the configuration. Measurements are cached by model, host and version
(--config.tuner.cache=false repeats them).
"""

import dataclasses
import pathlib
import time

import configs
from pipar_jax.config import AUTO, Config
from pipar_jax.config.schema import option
from pipar_jax.disk import files
from pipar_jax.disk.json_text import dumps
from pipar_jax.launch import flags, machine
from pipar_jax.methods.registry import uses_nodes
from pipar_jax.report.console import make_console


@dataclasses.dataclass
class ProfileFlags:
    """Flags of this binary."""

    json: str = option("", "also write the profile to this file, for pipar plan", path="")


def main(config: Config, own: ProfileFlags) -> None:
    """Prints the profile of a resolved configuration's hosts.

    Raises:
      ConfigError: The file cannot be written, or this machine lacks what a host needs.
      PiparError: A host cannot be measured, or writing the file failed.
    """
    if own.json:
        files.check_target(own.json, f"--json={own.json}")
    # Here, so that --help and wrong flags do not load jax.
    from pipar_jax.launch import local_profile
    from pipar_jax.tuner import tables

    if not uses_nodes(config.method):
        config = dataclasses.replace(config, method=AUTO)  # pipar plan plans for it
    machine.check(config)
    began_s = time.monotonic()
    profile = local_profile.profile_here(config)
    if own.json:  # first: what is printed may get lost
        text = dumps(profile.to_dict(), indent=1) + "\n"
        files.write_text(own.json, text, "choose another file with --json")
    console = make_console(120)
    for table in tables.units_tables(profile):
        console.print(table)
    console.print(tables.links_table(profile))
    for name, codec in profile.codecs.items():
        console.print(
            f"codec {name}: {codec.ratio:.3f} of the bytes, encodes "
            f"{1e-6 / codec.encode_s_per_byte:,.0f} MB/s, decodes "
            f"{1e-6 / codec.decode_s_per_byte:,.0f} MB/s"
        )
    console.print(f"measured in {time.monotonic() - began_s:.1f} s")


if __name__ == "__main__":
    flags.run(
        main,
        ProfileFlags,
        doc=__doc__,
        name="profile",
        presets=pathlib.Path(configs.__file__).parent,
    )
