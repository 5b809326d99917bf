"""Trains a preset on this machine: one server process and a process per device, over TCP.

Method, network, data, links and slowdowns are fields of the configuration, and every field is a
flag. Each run has a folder in runs/.
"""

import pathlib

import configs
from pipar_jax import data
from pipar_jax.config import Config, to_text
from pipar_jax.config.paths import shown
from pipar_jax.launch import flags, launcher, machine
from pipar_jax.launch.run_folders import check_place
from pipar_jax.report.event_lines import loss_text, losses_text
from pipar_jax.report.progress import ProgressDisplay
from pipar_jax.report.scores import final_score


def main(config: Config, _: flags.NoFlags) -> None:
    """Launches all hosts of a resolved configuration and follows them to the end.

    Raises:
      PiparError: This machine lacks what a host needs, or a host failed.
    """
    machine.check(config)
    check_place(config)
    print(to_text(config), flush=True)
    if table := data.table(config):
        print(f"\n{table}\n", flush=True)
    with ProgressDisplay() as progress:
        summary = launcher.launch(config, on_event=progress)
    print(
        f"{config.method}: {summary['epoch_seconds']:.2f} s per epoch, {final_score(summary)}, "
        f"loss {loss_text(summary)}; run in {shown(summary['folder'])}"
    )
    if lost := losses_text(summary):
        print(lost)


if __name__ == "__main__":
    flags.run(
        main,
        flags.NoFlags,
        doc=__doc__,
        name="train",
        presets=pathlib.Path(configs.__file__).parent,
    )
