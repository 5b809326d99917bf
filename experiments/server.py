r"""Runs the server of a run on this machine, for devices on other machines.

Start it with the same preset and overrides as the devices, on an address that they can reach:

  pipar server --config=cifar10_vgg5 --config.server.host=0.0.0.0 \
      --config.server.port=7000 --config.network.token=env:TOKEN

It waits for the devices, trains, and writes the run's folder on this machine.
"""

import pathlib
from typing import Any

import configs
from pipar_jax import data
from pipar_jax.config import Config, to_text
from pipar_jax.config.paths import shown
from pipar_jax.launch import flags, machine, process
from pipar_jax.launch.run_folders import check_place, hold_folder
from pipar_jax.methods.registry import hosts_of
from pipar_jax.report.event_lines import loss_text, losses_text
from pipar_jax.report.progress import ProgressDisplay
from pipar_jax.report.scores import final_score


def main(config: Config, _: flags.NoFlags) -> None:
    """Runs the server in this process.

    Raises:
      PiparError: The run failed.
    """
    machine.check(config, ["server"])
    check_place(config)
    process.set_environment(config, "server")
    process.claim_platform(hosts_of(config), "server")
    with hold_folder(config) as folder:
        print(to_text(config), flush=True)
        if table := data.table(config):
            print(f"\n{table}\n", flush=True)
        from pipar_jax.roles.server import run_server  # loads jax, whose environment is set now

        with ProgressDisplay() as progress:

            def tell(event: dict[str, Any]) -> None:
                if event["event"] == "listening":
                    print(f"listening on {event['host']}:{event['port']}", flush=True)
                progress(event)

            with process.finishing(config.checkpoint) as finish:
                summary = run_server(config, on_event=tell, finish=finish)
    print(
        f"{config.method}: {summary['epoch_seconds']:.2f} s per epoch, {final_score(summary)}, "
        f"loss {loss_text(summary)}; run in {shown(folder.path)}"
    )
    if lost := losses_text(summary):
        print(lost)


if __name__ == "__main__":
    flags.run(
        main,
        flags.NoFlags,
        doc=__doc__,
        name="server",
        presets=pathlib.Path(configs.__file__).parent,
    )
