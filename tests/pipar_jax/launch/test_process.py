"""A host's process: its environment, its exit code, and how errors read."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from comms.errors import PeerLost
from pipar_jax.config import CheckpointConfig, Config, to_json
from pipar_jax.errors import ConfigError, Interrupted, PeerError
from pipar_jax.launch import process
from pipar_jax.methods.registry import hosts_of
from pipar_jax.methods.resolution import resolve
from stages.errors import StageError
from tests.patience import PROCESS_S

VARIABLES = (
    "JAX_PLATFORMS",
    "JAX_ENABLE_X64",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES",
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    yield os.environ
    if cores:
        os.sched_setaffinity(0, cores)


def test_a_device_computes_on_the_cpu_and_the_server_where_jax_likes(environment: Any) -> None:
    config = resolve(Config())
    process.set_environment(config, "d0")
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" not in environment
    del environment["JAX_PLATFORMS"]
    process.set_environment(config, "server")
    assert "JAX_PLATFORMS" not in environment and "JAX_ENABLE_X64" not in environment
    assert environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


def test_double_precision_is_switched_on(environment: Any) -> None:
    config = Config()
    config.model.dtype = "float64"
    process.set_environment(resolve(config), "d0")
    assert environment["JAX_ENABLE_X64"] == "true"


def test_compiled_programs_are_kept_unless_told_otherwise(environment: Any) -> None:
    config = resolve(Config())
    config.run.compile_cache = False
    process.set_environment(config, "d0")
    assert "JAX_COMPILATION_CACHE_DIR" not in environment
    config.run.compile_cache = True
    process.set_environment(config, "d0")
    assert environment["JAX_COMPILATION_CACHE_DIR"].endswith(f"-{process.count_cores()}")
    environment["JAX_COMPILATION_CACHE_DIR"] = "mine"
    process.set_environment(config, "d0")
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "mine"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin")
def test_a_host_is_pinned_to_its_cores_and_its_programs_are_kept_apart(environment: Any) -> None:
    core = max(os.sched_getaffinity(0))
    config = Config()
    config.devices.overrides[1] = {"cpus": str(core)}
    process.set_environment(resolve(config), "d1")
    assert os.sched_getaffinity(0) == {core}
    assert environment["JAX_COMPILATION_CACHE_DIR"].endswith("-1")


def test_a_platform_without_a_device_is_refused_by_the_hosts_field(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import jax

    def devices() -> None:
        raise RuntimeError("Unable to initialize backend 'cuda'\nmore of it")

    monkeypatch.setattr(jax, "devices", devices)
    config = Config()
    config.server.platform = "cuda"
    config.devices.overrides = {1: {"platform": "cuda"}}
    for name, field in (("server", "server.platform"), ("d1", "devices.1.platform")):
        with pytest.raises(ConfigError) as caught:
            process.claim_platform(hosts_of(config), name)
        text = str(caught.value)
        assert text.startswith(f"{field}='cuda'") and "\n" not in text
        assert "Unable to initialize" in text and f"--config.{field}=cpu" in text
    process.claim_platform(hosts_of(config), "d0")  # the processor is always there


def run(task: Any, **options: Any) -> tuple[int, list[dict[str, Any]]]:
    told: list[dict[str, Any]] = []
    return process.perform(task, told.append, debug=False, **options), told


def fail(error: BaseException) -> Any:
    def task() -> None:
        raise error

    return task


def test_exit_codes() -> None:
    assert run(lambda: None) == (0, [])
    assert run(fail(KeyboardInterrupt())) == (130, [])
    assert run(fail(process.Terminated())) == (143, [])


def test_what_an_interruption_has_to_say_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(fail(KeyboardInterrupt("go on with --config.run.resume=auto"))) == (130, [])
    assert capsys.readouterr().err == "go on with --config.run.resume=auto\n"
    says = "has a checkpoint after 3 rounds"
    with (
        pytest.raises(KeyboardInterrupt, match=says),
        process.finishing(CheckpointConfig(every_rounds=1)),
    ):
        raise Interrupted(says)


def test_a_run_with_checkpoints_needs_no_main_thread() -> None:
    """Signals come to the main thread alone, where whoever started the thread heeds them."""
    came: list[bool] = []

    def work() -> None:
        with process.finishing(CheckpointConfig(every_rounds=1)) as finish:
            came.append(finish.is_set())

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert came == [False] and signal.getsignal(signal.SIGINT) is before


def test_sigterm_is_an_interruption_with_a_code_of_its_own() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        process.heed_termination()
        assert run(lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60)) == (143, [])
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("binary", ["train", "server", "report"])
def test_sigterm_ends_a_binary_in_one_line(binary: str, tmp_path: Path) -> None:
    """Its handler is there before the command line is read: a flag file that is a pipe waits."""
    pipe = tmp_path / "flags"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", f"experiments.{binary}", f"--flagfile={pipe}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        writer = os.open(pipe, os.O_WRONLY)  # returns once the child has opened it to read
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=PROCESS_S)
        os.close(writer)
    assert (child.returncode, out, err) == (143, b"", b"")


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ConfigError("a\n  b"), "ConfigError", "a b"),
        (PeerError("d1 is gone"), "PeerError", "d1 is gone"),
        (PeerLost("d1 is silent"), "PeerLost", "d1 is silent"),
        (StageError("unit 'x'"), "StageError", "unit 'x'"),
        (OSError(errno.ENOSPC, "No space", "/r/m"), "RunError", "no space left on the disk while"),
        (ZeroDivisionError("oh\nno"), "RunError", "unexpected ZeroDivisionError: oh (see"),
        (ValueError(), "RunError", "unexpected ValueError: no message"),
    ],
)
def test_an_error_is_told_in_one_line_without_a_traceback(
    error: Exception, kind: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, [told] = run(fail(error))
    wrong_use = isinstance(error, ConfigError)
    assert (
        code == (2 if wrong_use else 1)
        and told["event"] == "process_failed"
        and told["kind"] == kind
    )
    assert told["error"].startswith(text) and "\n" not in told["error"]
    assert capsys.readouterr().err == ""


def test_a_fault_leaves_its_traceback_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    _, [told] = run(fail(ZeroDivisionError("oh")), log="runs/x/logs/d0.log")
    assert told["error"].endswith("(traceback in runs/x/logs/d0.log)")
    assert "ZeroDivisionError: oh" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "free some, or choose another folder with --config.run.dir"),
        (errno.EDQUOT, "free some"),
        (errno.EROFS, "write permission"),
        (errno.EIO, "r/metrics.jsonl"),
    ],
)
def test_errors_of_the_disk_name_the_file_and_the_remedy(number: int, says: str) -> None:
    text = process.describe_os_error(OSError(number, os.strerror(number), "r/metrics.jsonl"))
    assert says in text and "r/metrics.jsonl" in text


def test_events_may_hold_numpys_numbers() -> None:
    reading, writing = os.pipe()
    tell = process.event_writer(writing)
    tell({"event": "x", "loss": np.float32(0.5), "per": np.arange(2), "path": os.path})
    text = os.read(reading, 1000).decode()
    os.close(reading)
    os.close(writing)
    assert text.startswith('{"event": "x", "loss": 0.5, "per": [0, 1], "path": "')
    assert text.endswith("\n")


def test_processes_load_no_jax_before_their_environment_is_set() -> None:
    code = (
        "import sys, pipar_jax.launch.process, pipar_jax.launch.flags; print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# A server whose four threads write 128 MB eight times, in turn; it tells of the last faults of all.
# Threads are given the arenas that there are in turn: one of two would show a second one.
FAULTS = """
import ctypes, resource, sys, threading
from pipar_jax.launch import process

library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
turn, together, faults = threading.Lock(), threading.Barrier(4), []

def write():
    together.wait()
    with turn:
        for round in range(8):
            if round == 4:
                before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
            block = library.malloc(1 << 27)
            ctypes.memset(block, 1, 1 << 27)
            library.free(block)
        faults.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)
    together.wait()

def serve(config, tell):
    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(max(faults), flush=True)

process.main(["--name=server", "--config=" + sys.argv[1], "--events=2"], serve)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_threads_of_a_host_reuse_large_blocks_without_page_faults(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(to_json(resolve(Config())))
    ours, parents = os.pipe()  # a host ends when its parent's end is closed
    with os.fdopen(ours), os.fdopen(parents, "w"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, path], stdin=ours, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100
