"""What every test gets: a look, after it, for threads, sockets and child processes left behind."""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from hypothesis import HealthCheck, settings

from pipar_jax.launch.process import compiled_programs
from stages.compile_cache import share_compile_cache

# Tests never need an accelerator, and must see the same devices wherever they run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What the processes of a test cache (data sets, compiled programs) stays with the checkout.
CACHE = Path(__file__).resolve().parent.parent / ".pytest_cache" / "user"
os.environ["XDG_CACHE_HOME"] = str(CACHE)
# Most of a cold run is spent in XLA. Programs of tests are small and run a few times, so they are
# compiled in a third of the time, without optimisation and without the code generator for fused
# loops. What is compared is compiled alike. `make soak` leaves XLA as users have it.
COMPILE_FAST = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)

# How long an example takes depends on what else the machine does: no test fails for it.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# A shell starts what runs in its background deaf to Ctrl-C, and children would be deaf as well.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long a thread or process that was told to end may take to be gone.
GRACE_S = 30.0
# Threads that libraries keep for the life of the process, by the start of their names.
LIBRARY_THREADS = ("pydevd", "tqdm", "asyncio_", "orbax", "IPython", "pytest_timeout")


def pytest_configure(config: pytest.Config) -> None:
    """Tells XLA, before anything has loaded it, here and in the processes that tests start."""
    if not _soaks(config):
        os.environ.setdefault("XLA_FLAGS", " ".join(COMPILE_FAST))


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what `make soak` runs: all long cases of a list, and what holds durations to limits."""
    cases: collections.Counter[str] = collections.Counter()
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is not None and item.get_closest_marker("soak") is None:
            every, *first = mark.args
            of = item.nodeid.partition("[")[0]
            if (cases[of] - (first[0] if first else 0)) % every:
                item.add_marker(pytest.mark.soak)
            cases[of] += 1
        if "quiet" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timed)


def pytest_collection_finish() -> None:
    """Keeps what this process compiles where processes of hosts do: each finds what others did."""
    # Modules stay anyway: without them a look for garbage takes a tenth of the time.
    gc.collect()
    gc.freeze()
    if "jax" in sys.modules:
        jax = sys.modules["jax"]
        share_compile_cache()
        jax.config.update("jax_compilation_cache_dir", str(compiled_programs()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Resources(NamedTuple):
    """What a process holds that a test must give back."""

    threads: frozenset[tuple[int, str]]
    sockets: frozenset[str]
    children: frozenset[tuple[int, str]]

    @classmethod
    def held(cls) -> Resources:
        """Return what this process holds now."""
        threads = frozenset(
            (thread.ident or 0, thread.name)
            for thread in threading.enumerate()
            if thread is not threading.main_thread() and not thread.name.startswith(LIBRARY_THREADS)
        )
        return cls(threads, _sockets(), _children())

    def beyond(self, before: Resources) -> Resources:
        """Return what is held now and was not ``before``."""
        return Resources(*(now - then for now, then in zip(self, before, strict=True)))

    def __str__(self) -> str:
        return "; ".join(
            f"{kind}: {', '.join(sorted(map(str, items)))}"
            for kind, items in zip(self._fields, self, strict=True)
            if items
        )


def _sockets() -> frozenset[str]:
    """Return the sockets of this process, by inode; none where there is no /proc."""
    found = set()
    if sys.platform.startswith("linux"):
        for descriptor in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{descriptor}")
            except FileNotFoundError:  # the descriptor of the listing itself
                continue
            if target.startswith("socket:"):
                found.add(target)
    return frozenset(found)


def _children() -> frozenset[tuple[int, str]]:
    """Return the child processes, (pid, command line), with dead ones that nobody waited for."""
    if hasattr(os, "waitid"):
        try:  # most tests start none: the kernel says so at once, where a look at all takes 3 ms
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return frozenset()
    found = set()
    for child in psutil.Process().children(recursive=True):
        try:
            found.add((child.pid, " ".join(child.cmdline()) or f"{child.name()} (a zombie)"))
        except psutil.NoSuchProcess:
            continue
        except psutil.ZombieProcess:
            found.add((child.pid, "a zombie"))
    # multiprocessing keeps one tracker of its own for the life of the process.
    return frozenset(item for item in found if "resource_tracker" not in item[1])


@pytest.fixture(autouse=True)
def precision(precision_of_file: None) -> Iterator[None]:
    """Lets no test leave jax in 64 bits: a run in float64 sets them for its whole process."""
    before = _is_wide()
    yield
    if not before:  # otherwise it is the file's own
        _narrow()


@pytest.fixture(autouse=True, scope="module")
def precision_of_file() -> Iterator[None]:
    """Lets no file of tests leave jax in 64 bits, as one does whose fixture is a run in float64."""
    yield
    _narrow()


def _narrow() -> None:
    if _is_wide():
        sys.modules["jax"].config.update("jax_enable_x64", False)


def _is_wide() -> bool:
    """Returns whether jax computes in 64 bits; a process that has not loaded it does not."""
    jax = sys.modules.get("jax")
    return bool(jax is not None and jax.config.jax_enable_x64)


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fail a test after which threads, sockets or child processes of its own are still there."""
    before = Resources.held()
    yield
    left = Resources.held().beyond(before)
    patience = time.monotonic() + GRACE_S
    while any(left) and time.monotonic() < patience:
        gc.collect()
        time.sleep(0.02)
        left = Resources.held().beyond(before)
    if any(left):
        pytest.fail(f"left behind {GRACE_S:g} s after the test: {left}", pytrace=False)


def _soaks(config: pytest.Config) -> bool:
    chosen = config.option.markexpr.replace("not soak", "")
    return "soak" in chosen or "timed" in chosen


@pytest.fixture
def quiet(request: pytest.FixtureRequest) -> bool:
    """Whether durations say something of what is tested, not of what else the machine does.

    `make soak` has the machine to itself. `make test` runs two files of tests at a time, on
    machines that may be busy: there no test may fail for what took long.
    """
    return _soaks(request.config)


Within = Callable[..., contextlib.AbstractContextManager[None]]


@pytest.fixture
def within(quiet: bool) -> Within:
    """Returns ``held``: a block that must end in so many seconds, where ``quiet`` is true."""
    return functools.partial(held, quiet)


@contextlib.contextmanager
def held(
    quiet: bool, limit_s: float, clock: Callable[[], float] = time.monotonic
) -> Iterator[None]:
    """Asserts that the block ended within a time, by a clock, if durations say something."""
    began_s = clock()
    yield
    took_s = clock() - began_s
    assert not quiet or took_s < limit_s, f"took {took_s:.2f} s, not {limit_s:g} s"
