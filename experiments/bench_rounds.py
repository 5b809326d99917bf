"""Rounds of federated averaging, ours and Flower's: seconds and peak memory.

Weights of 0.4, 45 and 135 MB, 2 and 8 clients, everything on this machine over loopback, without
TLS. Ours: a server process and a process per device, which takes one optimiser step on two samples
of a network whose computation is next to nothing. Flower's: its current server and client apps
under its SuperLink and SuperNodes as they are by default, with a client that returns its arrays at
once. Both average all clients and evaluate nothing. A round lasts from the end of the one before to
its own; the first is left out. Memory is the largest sum of the resident sizes of all processes.

Flower is in the extra ``peers``, or in a separate environment, named by --flower_bin:

  python -m experiments.bench_rounds [--flower_bin=FOLDER/bin] [--results=FOLDER] [--quick]

With --results=FOLDER measurements are saved and not repeated.
"""

import contextlib
import functools
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from absl import flags

from experiments.benchmarks import flower_app, harness, process_memory
from pipar_jax.disk import files
from pipar_jax.errors import ConfigError, RunError
from pipar_jax.launch import plain_flags
from pipar_jax.launch.plain_flags import list_of, positive

SIZES_MB = plain_flags.define(
    "sizes_mb", [0.4, 45.0, 135.0], "Megabytes of weights.", list_of(positive(float), once=True)
)
CLIENTS = plain_flags.define(
    "clients", [2, 8], "Numbers of clients.", list_of(positive(int), once=True)
)
REPEATS = flags.DEFINE_integer("repeats", 2, "Runs of each setting, alternating.", lower_bound=1)
FLOWER_BIN = plain_flags.define_path(
    "flower_bin", str(Path(sys.executable).parent), "Folder of Flower's programs."
)
RESULTS = plain_flags.define_folder(
    "results", "Folder in which measurements are saved and reused; empty: none."
)
ROUNDS = 5
LIMIT_S = 900.0
Measured = tuple[list[float], int]
System = Callable[[float, int, Path], Measured]


def ours(megabytes: float, clients: int, folder: Path) -> Measured:
    """Returns the seconds of rounds of a run of ours, and the peak memory."""
    data, metrics = folder / "data.npz", folder / "runs" / "rounds" / "metrics.jsonl"
    x, y = np.ones((2, 8), np.float32), np.arange(2, dtype=np.int32)
    with files.replacing(data) as aside:
        np.savez(aside, x_train=x, y_train=y, x_test=x, y_test=y)
    command = [
        sys.executable, "-m", "experiments.train", "--config=digits", "--config.name=rounds",
        f"--config.run.dir={folder / 'runs'}", f"--config.data.source=npz:{data}",
        "--config.method=fl", f"--config.devices.count={clients}", "--config.data.batch_size=2",
        "--config.model.name=module:experiments.benchmarks.round_model:build",
        f"--config.model.args=megabytes={megabytes}", f"--config.run.rounds={ROUNDS}",
        "--config.run.evaluate_every=0",
    ]  # fmt: skip
    ends_s: list[float] = []
    with _started(command, folder / "ours.log") as process:
        with process_memory.sampled(os.getpid()) as peak:
            began_s = time.monotonic()
            while process.poll() is None and time.monotonic() - began_s < LIMIT_S:
                seen = metrics.read_text().count('"round_finished"') if metrics.exists() else 0
                ends_s += [time.monotonic()] * (seen - len(ends_s))
                time.sleep(0.005)
        if process.poll() != 0:
            raise RunError(f"our run failed: {(folder / 'ours.log').read_text()[-300:]}")
    return [b - a for a, b in itertools.pairwise(ends_s)], peak.nbytes


def flowers(megabytes: float, clients: int, folder: Path) -> Measured:
    """Returns the seconds of rounds of Flower's apps, and the peak memory."""
    flower_app.write(folder / "app")
    home, out = folder / "home", folder / "seconds.json"
    home.mkdir()
    address = f"127.0.0.1:{_free_port()}"
    here = f'[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    files.write_text(home / "config.toml", f'[superlink]\ndefault = "here"\n{here}')
    programs: Path = FLOWER_BIN.value
    environment = {
        **os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    host, _, port = address.partition(":")
    link = [
        str(programs / "flower-superlink"), "--insecure", f"--host={host}", f"--port={port}",
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    config = f'clients={clients} rounds={ROUNDS} megabytes={megabytes} out="{out}"'
    submit = [str(programs / "flwr"), "run", str(folder / "app"), "here", "--run-config", config]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_started(link, folder / "superlink.log", environment))
        _await_port(int(port))
        for index in range(clients):
            program = str(programs / "flower-supernode")
            ports = [f"--superlink={address}", f"--port={_free_port()}"]
            node = [program, "--insecure", "--host=127.0.0.1", *ports]
            stack.enter_context(_started(node, folder / f"supernode{index}.log", environment))
        with process_memory.sampled(os.getpid()) as peak:
            _submit(submit, environment)
            until_s = time.monotonic() + LIMIT_S
            while not out.exists():
                if time.monotonic() > until_s:
                    logged = (folder / "superlink.log").read_text()[-600:]
                    raise RunError(f"Flower's rounds did not end in {LIMIT_S:.0f} s: {logged}")
                time.sleep(0.1)
    seconds: list[float] = json.loads(out.read_text())
    return seconds[1:], peak.nbytes


def _submit(command: list[str], environment: dict[str, str]) -> None:
    """Runs the program by which a run is handed to Flower.

    Raises:
      RunError: It fails, or does not end.
    """
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(f"Flower did not take the run within {LIMIT_S:.0f} s") from error
    if done.returncode:
        raise RunError(f"Flower's run was refused: {(done.stdout + done.stderr)[-300:]}")


@contextlib.contextmanager
def _started(
    command: list[str], log: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a program, whose processes are ended at the end of the with statement."""
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        ) as process,
    ):
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _await_port(port: int) -> None:
    """Waits until something listens.

    Raises:
      RunError: Nothing does.
    """
    until_s = time.monotonic() + 120
    while time.monotonic() < until_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise RunError(f"Flower's SuperLink does not listen on port {port}")


def alternate(
    run: harness.Bench, systems: Mapping[str, System], megabytes: float, clients: int, repeats: int
) -> dict[str, list[Measured]]:
    """Runs the systems alternately in one setting; returns what each run measured."""
    measured: dict[str, list[Measured]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name, system in systems.items():
            run.progress(f"{megabytes:g} MB, {clients} clients: {name}")
            with tempfile.TemporaryDirectory() as folder:
                measured[name].append(system(megabytes, clients, Path(folder)))
    return measured


def measure(run: harness.Bench) -> None:
    """Runs every setting; with --quick the smallest."""
    systems: dict[str, System] = {"ours": ours}
    if os.path.exists(FLOWER_BIN.value / "flower-superlink"):
        systems["Flower"] = flowers
    elif FLOWER_BIN.present:
        raise ConfigError(
            f"--flower_bin={FLOWER_BIN.value}: there is no flower-superlink: name the folder of "
            "Flower's programs, such as FOLDER/bin of an environment with flwr"
        )
    else:
        run.missing("Flower is not installed (extra `peers`, or --flower_bin): no ratios.")
    repeats = run.reduced(REPEATS, 1)
    with tempfile.TemporaryDirectory() as folder:
        results = files.make_folder(RESULTS.value or folder, "choose another folder with --results")
        for megabytes in run.reduced(SIZES_MB, SIZES_MB.value[:1]):
            for clients in run.reduced(CLIENTS, CLIENTS.value[:1]):
                cell = f"{megabytes:g} MB, {clients} clients"
                name = f"rounds {cell} {' '.join(systems)} x{repeats}"
                setting = run, systems, megabytes, clients, repeats
                measured = harness.kept(results, name, functools.partial(alternate, *setting))
                report(run, cell, measured)


def report(run: harness.Bench, cell: str, measured: Mapping[str, list[Measured]]) -> None:
    """Adds the rows of a setting."""
    seconds, memory = {}, {}
    for name, runs in measured.items():
        seconds[name] = statistics.median(s for rounds, _ in runs for s in rounds)
        memory[name] = min(nbytes for _, nbytes in runs)
        run.row(f"{cell}, {name}, a round", seconds[name], "s")
        run.row(f"{cell}, {name}, peak memory of all processes", memory[name] / 1e6, "MB")
    if "Flower" in measured:
        ratio = seconds["Flower"] / seconds["ours"]
        run.row(f"{cell}, Flower / ours, seconds", ratio, "x", 2.0, "higher")
        run.row(f"{cell}, ours / Flower, memory", memory["ours"] / memory["Flower"], "x", 0.7)


if __name__ == "__main__":
    harness.run(measure)
