"""One host as a process: ``python -m pipar_jax.launch.process --name=server|d0|n1 …``.

The launcher starts these processes. A process pins itself and sets jax's environment before it
loads jax, reports events as JSON lines on a pipe, reports an error in one line, and never outlives
its parent.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import os
import pathlib
import platform
import queue
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import pipar_jax
import stages
from comms.errors import explain
from pipar_jax.config import HIDDEN_TOKEN, CheckpointConfig, Config, Hosts, from_json
from pipar_jax.data.cache import user_cache
from pipar_jax.disk.event_log import OnEvent
from pipar_jax.disk.files import RUN_REMEDY, describe_os_error
from pipar_jax.disk.json_text import JsonObject, dumps
from pipar_jax.errors import ConfigError, Interrupted, PiparError
from pipar_jax.launch import machine
from pipar_jax.launch.streams import OUTPUT_REMEDY, OUTPUTS, open_streams
from pipar_jax.methods.registry import hosts_of
from pipar_jax.privacy.clip_watch import CLIP_LOG
from pipar_jax.report import logs
from pipar_jax.schedule.plan import COORDINATOR, host_index, is_node

#: Passes the shared secret to child processes, so that neither files nor command lines contain it.
TOKEN_VARIABLE = "PIPAR_TOKEN"
#: Variable with the launcher's module path.
PATH_VARIABLE = "PIPAR_PATH"
WRONG_USE = 2
INTERRUPTED = 130
TERMINATED = 143
#: Messages for requested ends, by exit code.
ASKED_TO_END = {INTERRUPTED: "interrupted", TERMINATED: "terminated"}

#: Runs a server, given its configuration and a function for its events.
Serve = Callable[[Config, OnEvent], None]


#: The line by which a parent asks its server to end after a checkpoint.
FINISH = "finish"
_FINISH = threading.Event()


class Terminated(KeyboardInterrupt):
    """SIGTERM, with which service managers and container runtimes end a process."""


def heed_termination() -> None:
    """Turns SIGTERM into an exception, so that peers are notified and resources released."""

    def end(number: int, frame: object) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, end)


@contextlib.contextmanager
def finishing(checkpoint: CheckpointConfig) -> Iterator[threading.Event]:
    """Lets the first Ctrl-C or SIGTERM end a run after a checkpoint, and a second one immediately.

    A run without checkpoints ends immediately, and so does one outside of the main thread, which
    alone is told of signals: there the block is left to whoever heeds them.

    Args:
      checkpoint: How often the run keeps checkpoints.

    Yields:
      An event that is set by the first signal.

    Raises:
      KeyboardInterrupt: The run has ended as requested.
    """
    finish = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    on_main = threading.current_thread() is threading.main_thread()
    if not (on_main and (checkpoint.every_rounds or checkpoint.every_s)):
        yield finish
        return
    before = {number: signal.getsignal(number) for number in numbers}
    came: list[int] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        came.append(number)
        restore()
        finish.set()
        print("ending after this round with a checkpoint; repeat to end at once", file=sys.stderr)

    for number in numbers:
        signal.signal(number, note)
    try:
        yield finish
    except Interrupted as error:
        asked = Terminated if came == [signal.SIGTERM] else KeyboardInterrupt
        raise asked(str(error)) from error
    finally:
        restore()


def set_environment(config: Config, name: str) -> None:
    """Pins this process and sets jax's environment, before jax is loaded.

    The C library is set to keep freed memory; otherwise every step causes page faults again.

    Args:
      config: Resolved configuration.
      name: The host's name, such as ``server``, ``d0`` or ``n1``.

    Raises:
      ConfigError: A core is not available, or this system cannot pin.
    """
    stages.retain_memory()
    hosts = hosts_of(config)
    host = hosts[name]
    if cores := machine.find_cores(hosts, host):
        os.sched_setaffinity(0, cores)
    if host.platform != "auto":
        os.environ["JAX_PLATFORMS"] = host.platform
    else:
        logs.leave_out_tpu()
    if host.platform != "cpu":
        # Several hosts may share an accelerator: none may preallocate all of its memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if config.model.dtype == "float64":
        os.environ["JAX_ENABLE_X64"] = "true"
    if config.run.compile_cache:
        _keep_compiled_programs()


def claim_platform(hosts: Hosts, name: str) -> None:
    """Loads jax and initialises the platform of a host.

    Raises:
      ConfigError: Jax finds no accelerator of the platform.
    """
    wanted = hosts[name].platform
    if wanted in ("auto", "cpu"):  # always available; jax is loaded where it is needed
        return
    import jax

    try:
        jax.devices()
    except RuntimeError as error:  # jax raises no narrower type
        field = hosts.path(name, "platform")
        raise machine.no_device(wanted, field, _first_line(error)) from error


def _keep_compiled_programs() -> None:
    """Enables jax's compilation cache, unless the user has configured one."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled_programs()))
    # Stages are many small programs; the default caches only those that compile for a second.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def compiled_programs() -> pathlib.Path:
    """Returns the folder in the user's cache for programs that this process compiles.

    Programs depend on the kind of processor and, on a CPU, on the number of cores, which jax does
    not include in its keys: the name of the folder includes both.
    """
    kind = platform.processor()
    with contextlib.suppress(OSError):  # Linux only, and more detailed
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
        kind = "".join(re.findall(r"^(?:model name|flags|Features)\s*:.*$", text, re.M)[:2])
    mark = hashlib.sha256(kind.encode()).hexdigest()[:12]
    return user_cache() / "compiled" / f"{platform.machine()}-{mark}-{count_cores()}"


def count_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def perform(task: Callable[[], object], tell: OnEvent, *, debug: bool, log: str = "") -> int:
    """Runs the work of a process and returns its exit code.

    This is the outermost handler of a process: it reports any error in one line, and what an
    interruption has to say, such as how the run can be resumed.

    Args:
      task: The work.
      tell: Called with ``{"event": "process_failed", "kind": …, "error": …}``.
      debug: Whether to print the traceback of an error.
      log: The log to which tracebacks are written, for the message; empty for the terminal.

    Returns:
      0 on success, 1 after an error, 2 after an error in the configuration or command line, 130
      after Ctrl-C, 143 after SIGTERM (if handled).
    """
    from comms.errors import ChannelError
    from stages.errors import StageError

    try:
        task()
        return 0
    except KeyboardInterrupt as error:
        if text := str(error):
            print(text, file=sys.stderr)
        return code_of(error)
    except Exception as error:  # expected errors become one line, unexpected ones have a traceback
        known = isinstance(error, PiparError | ChannelError | StageError)
        foreseen = known and not (isinstance(error, PiparError) and error.of_user)
        if known:
            kind, text = type(error).__name__, " ".join(str(error).split())
        elif isinstance(error, OSError):
            spoken = error.filename in OUTPUTS.values()
            remedy = OUTPUT_REMEDY if spoken else RUN_REMEDY
            kind, text = "RunError", describe_os_error(error, remedy)
        else:
            kind, text = "RunError", f"unexpected {type(error).__name__}: {_first_line(error)}"
        if not foreseen and not isinstance(error, OSError):
            text += f" (traceback in {log})" if log else " (see the traceback with --debug)"
        if debug or (log and not foreseen):  # always written to a log
            traceback.print_exc()
        tell({"event": "process_failed", "kind": kind, "error": text})
        return WRONG_USE if isinstance(error, ConfigError) else 1


def code_of(error: KeyboardInterrupt) -> int:
    """Returns the exit code for an interruption."""
    return TERMINATED if isinstance(error, Terminated) else INTERRUPTED


def leave(code: int) -> NoReturn:
    """Ends this process immediately, without joining its threads.

    After a failure threads may still wait for a peer.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk or a closed terminal
            stream.flush()
    os._exit(code)


def event_writer(descriptor: int) -> OnEvent:
    """Returns a function that writes events as JSON lines; any thread may call it."""
    lock = threading.Lock()

    def tell(event: JsonObject) -> None:
        line = dumps(event).encode() + b"\n"
        with lock:
            while line:
                line = line[os.write(descriptor, line) :]

    return tell


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _die_with_parent() -> queue.SimpleQueue[str]:
    """Ends this process when its parent ends; returns the lines that the parent sends.

    The parent holds the other end of standard input, so that its end, even by SIGKILL, is an end of
    file here. On Linux the kernel also kills this process, in case Python is blocked.
    """
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def watch() -> None:
        for line in sys.stdin:
            if line.strip() == FINISH:
                _FINISH.set()
            lines.put(line.strip())
        os._exit(1)

    threading.Thread(target=watch, name="pipar-parent", daemon=True).start()
    return lines


def _load_config(path: pathlib.Path) -> Config:
    try:
        config = from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {explain(error)}") from error
    if config.network.token == HIDDEN_TOKEN:
        config.network.token = os.environ.get(TOKEN_VARIABLE)
    return config


def _run_server(config: Config, tell: OnEvent) -> None:
    from pipar_jax.roles.server import run_server

    def note(event: JsonObject) -> None:
        logs.note_event(event)
        tell(event)

    run_server(config, on_event=note, finish=_FINISH)


def _run_worker(config: Config, name: str, lines: queue.SimpleQueue[str]) -> None:
    from pipar_jax.roles import participants  # while the address is unknown: loading takes seconds

    host, _, port = lines.get().rpartition(":")
    run = participants.run_node if is_node(name) else participants.run_device
    run(config, host_index(name), (host, int(port)))


def main(arguments: list[str] | None = None, serve: Serve = _run_server) -> NoReturn:
    """Runs the role that the command line names and ends the process.

    Args:
      arguments: The command line; the process's own unless given.
      serve: Runs the server.
    """
    open_streams()
    parser = argparse.ArgumentParser(prog="python -m pipar_jax.launch.process", description=__doc__)
    parser.add_argument("--name", required=True, help="host to run: server, d0, n1, …")
    parser.add_argument("--config", type=pathlib.Path, required=True, help="saved configuration")
    parser.add_argument(
        "--events", type=int, required=True, help="file descriptor to which events are written"
    )
    parser.add_argument("--log", default="", help="name of the file that contains the output")
    given = parser.parse_args(arguments)
    # The working directory may contain the user's modules but must not shadow our packages.
    with contextlib.suppress(OSError):  # the folder was deleted
        sys.path.append(os.getcwd())
    theirs = os.environ.get(PATH_VARIABLE, "").split(os.pathsep)
    sys.path.extend(path for path in theirs if path and path not in sys.path)
    logs.begin()
    logs.LOG.info("%s of pipar_jax %s, process %d", given.name, pipar_jax.__version__, os.getpid())
    stages.retain_memory()  # before there is a second thread, which has its own arena
    lines = _die_with_parent()
    tell = event_writer(given.events)
    CLIP_LOG.addHandler(logs.EventHandler(given.name, tell))
    debug = False

    def task() -> None:
        nonlocal debug
        config = _load_config(given.config)
        debug = config.debug
        set_environment(config, given.name)
        claim_platform(hosts_of(config), given.name)
        if given.name == COORDINATOR:
            serve(config, tell)
        else:
            _run_worker(config, given.name, lines)

    def tell_failure(event: JsonObject) -> None:
        logs.LOG.error("%s", event["error"])
        tell(event)

    code = perform(task, tell_failure, debug=debug, log=given.log)
    logs.LOG.info("ends with code %d", code)
    leave(code)


if __name__ == "__main__":
    main()
