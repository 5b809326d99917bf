"""What several processes of a machine need at once is compiled by one of them."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stages.compile_once import claimed
from tests.patience import PROCESS_S

pytest.importorskip("fcntl", reason="locks of files are Unix's")

# Compiles a program when it is told to, and prints how many it wrote to the cache.
COMPILE = """
import sys, warnings
warnings.simplefilter("error")
import jax, jax.numpy as jnp
from stages.compile_cache import share_compile_cache
assert share_compile_cache()
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
x = jax.device_put(2.0)
written = 0
def count(name, **_):
    global written
    written += name == "/jax/compilation_cache/cache_misses"
jax.monitoring.register_event_listener(count)
def many(x):
    for _ in range(30):
        x = jnp.sin(x) + jnp.cumsum(jnp.ones(64) * jnp.cos(x))[3]
    return x
traced = jax.jit(many).lower(x)
print("ready", flush=True)
sys.stdin.readline()
traced.compile()(x)
print(written)
"""
HOLD = """
import sys, time
from pathlib import Path
from stages.compile_once import claimed
with claimed(Path(sys.argv[1])) as held:
    print(held, flush=True)
    time.sleep(3600)
"""


def test_processes_that_need_a_program_at_once_compile_it_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", COMPILE, str(tmp_path)]
    pipe = subprocess.PIPE
    started = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    try:
        for process in started:
            assert process.stdout.readline() == "ready\n"
        before = len(list(tmp_path.iterdir()))
        for process in started:
            process.stdin.write("\n")
            process.stdin.flush()
        written = [int(process.communicate(timeout=PROCESS_S)[0]) for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert sorted(written) == [0, 1]
    assert len(list(tmp_path.iterdir())) == before + 1  # and no lock is left


def test_the_next_holder_waits_for_the_one_before(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", []
    inside = threading.Event()

    def follow() -> None:
        inside.wait()
        with claimed(path) as held:
            order.append(held)

    thread = threading.Thread(target=follow)
    thread.start()
    with claimed(path) as held:
        inside.set()
        with claimed(path, patience_s=0.1) as second:
            assert not second
        assert path.exists()
        order.append(held)
    thread.join()
    assert order == [True, True]
    assert not path.exists()


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "True\n"
            with claimed(path, patience_s=0.0) as held:
                assert not held
        finally:
            process.kill()
    with claimed(path) as held:
        assert held


def test_where_nothing_can_be_locked_it_goes_on_without(tmp_path: Path) -> None:
    with claimed(tmp_path / "missing" / "lock") as held:
        assert not held
