"""Predicts and prints the best plans of a configuration, without training.

Hosts and links are measured on this machine (or read from --profile), then the tuner searches
method, cut, number of micro-batches N, codecs and dispatch policy for the shortest epoch. The
bottleneck of a plan is its busiest resource. The paper's own choice is listed below, evaluated in
the same way. A table explains the codec of each link; --config.tuner.codecs=raw leaves codecs out.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any

import configs
from comms.errors import explain
from pipar_jax.config import AUTO, Config
from pipar_jax.config.schema import option
from pipar_jax.cost_model.profile import Profile
from pipar_jax.errors import ConfigError, PlanError
from pipar_jax.launch import flags, machine
from pipar_jax.methods.registry import uses_nodes
from pipar_jax.report.console import make_console


@dataclasses.dataclass
class PlanFlags:
    """Flags of this binary."""

    profile: str = option("", "file with the profile, as written by pipar profile", path="")


def main(config: Config, own: PlanFlags) -> None:
    """Prints the best plans of a resolved configuration.

    Raises:
      ConfigError: The profile's file cannot be read, or does not match the configuration.
      PlanError: There is no feasible plan.
    """
    # Here, so that --help and wrong flags do not load jax.
    from pipar_jax.launch import local_profile
    from pipar_jax.tuner import codec_choice, search, tables, tune

    if not uses_nodes(config.method):
        config = dataclasses.replace(config, method=AUTO)  # what would run is what is planned
    if not own.profile:
        machine.check(config)
    began_s = time.monotonic()
    profile = read(own.profile) if own.profile else local_profile.profile_here(config)
    check_fits(config, profile)
    measured_s = time.monotonic() - began_s
    if uses_nodes(config.method):
        print_chains(config, profile, measured_s)
        return
    found = search(profile, config)
    searched_s = time.monotonic() - began_s - measured_s
    console = make_console(120)
    console.print(
        f"{profile.model}, {len(profile.devices)} devices, batches of {profile.batch_size}; hosts "
        f"and links measured in {measured_s:.1f} s, plans searched in {searched_s:.2f} s"
    )
    console.print(tables.plans_table(profile, found))
    console.print(tables.verdict(found))
    candidates = codec_choice.candidates_for(config, profile)
    if (why := tables.codecs_table(profile, found.plans[0], candidates)) is not None:
        console.print(why)
    if words := candidates.words():
        console.print(f"codecs: {words}")
    chosen = found.plans[0].plan if config.tuner.select == "search" else tune(profile, config)
    console.print(f"--config.method=auto would run: {chosen}")


def print_chains(config: Config, profile: Profile, measured_s: float) -> None:
    """Prints the best chain over the compute nodes, and the best by the published objective.

    Raises:
      PlanError: There is no feasible chain.
    """
    from pipar_jax.tuner import codec_choice
    from pipar_jax.tuner.chains import chain_table, tune_chain
    from pipar_jax.tuner.tables import codecs_table

    began_s = time.monotonic()
    found = {}
    for name, select in (("the simulator", "search"), ("MP-SL's objective", "paper")):
        tuner = dataclasses.replace(config.tuner, select=select)
        found[name] = tune_chain(profile, dataclasses.replace(config, tuner=tuner))
    console = make_console(120)
    console.print(
        f"{profile.model}, {len(profile.devices)} devices, {len(profile.nodes)} compute nodes, "
        f"batches of {profile.batch_size}; hosts and links measured in {measured_s:.1f} s, chains "
        f"planned in {time.monotonic() - began_s:.2f} s"
    )
    console.print(chain_table(profile, found))
    candidates = codec_choice.candidates_for(config, profile)
    if (why := codecs_table(profile, found["the simulator"], candidates)) is not None:
        console.print(why)


def check_fits(config: Config, profile: Profile) -> None:
    """Checks that a profile, such as one from a file, is of a configuration's model and hosts.

    Raises:
      ConfigError: It is of others.
    """
    checked: list[tuple[str, Any, str, Any]] = [
        ("model", profile.model, "model.name", config.model.name),
        ("mini-batch", profile.batch_size, "data.batch_size", config.data.batch_size),
        ("number of devices", len(profile.devices), "devices.count", config.devices.total),
    ]
    if uses_nodes(config.method):
        checked.append(
            ("number of compute nodes", len(profile.nodes), "nodes.count", config.nodes.count)
        )
    for what, found, field, wanted in checked:
        if found != wanted:
            raise ConfigError(
                f"the profile's {what} is {found} and the configuration's is {wanted}: set "
                f"--config.{field}={found}, or measure again with pipar profile"
            )


def read(path: str) -> Profile:
    """Reads a profile.

    Raises:
      ConfigError: The file cannot be read or is not a profile.
    """
    try:
        return Profile.from_dict(json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"--profile={path} cannot be read: {explain(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--profile={path} cannot be read: not a text file") from error
    except (json.JSONDecodeError, PlanError) as error:
        raise ConfigError(f"--profile={path}: {error}") from error


if __name__ == "__main__":
    flags.run(
        main,
        PlanFlags,
        doc=__doc__,
        name="plan",
        presets=pathlib.Path(configs.__file__).parent,
    )
