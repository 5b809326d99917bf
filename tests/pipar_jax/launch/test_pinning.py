"""Pinned work: where it runs, what it sees, and how it fails."""

from __future__ import annotations

import os

import pytest

from comms.errors import PeerLost
from pipar_jax.errors import ConfigError, RunError
from pipar_jax.launch.pinning import PinnedProcess, environment, first_cores, pinned, run_pinned
from stages.errors import StageError

can_pin = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process to cores"
)


def _where() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def _divide(a: float, b: float) -> float:
    return a / b


def _fail(kind: type[Exception]) -> None:
    raise kind("at fault")


def _end() -> None:
    os._exit(7)


@can_pin
def test_a_block_is_pinned_and_the_cores_come_back() -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    with pinned([core]):
        assert os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == before


@can_pin
def test_a_core_that_is_not_there_is_refused() -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(RunError, match=r"cannot pin to cores \[99999\]"), pinned([99999]):
        pytest.fail("the block was run")
    assert os.sched_getaffinity(0) == before


@can_pin
def test_no_cores_means_anywhere() -> None:
    before = os.sched_getaffinity(0)
    with pinned([]):
        assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(0) == before


def test_the_environment_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPAR_TEST_OLD", "old")
    monkeypatch.delenv("PIPAR_TEST_NEW", raising=False)
    with environment({"PIPAR_TEST_OLD": "other", "PIPAR_TEST_NEW": "new"}):
        assert os.environ["PIPAR_TEST_OLD"] == "other"
        assert os.environ["PIPAR_TEST_NEW"] == "new"
    assert os.environ["PIPAR_TEST_OLD"] == "old"
    assert "PIPAR_TEST_NEW" not in os.environ


@can_pin
def test_a_process_runs_on_its_cores_with_its_environment() -> None:
    core = first_cores(1)
    with PinnedProcess("worker", cores=core, variables={"PIPAR_TEST": "seen"}) as process:
        assert process.call(_where) == core
        assert process.call(os.getenv, "PIPAR_TEST") == "seen"
        assert process.call(_divide, 1.0, b=4.0) == 0.25
    assert "PIPAR_TEST" not in os.environ


def test_a_failure_is_raised_here_with_its_traceback_and_the_process_goes_on() -> None:
    with PinnedProcess("worker") as process:
        says = "_divide failed in process worker: ZeroDivisionError: float division by zero"
        with pytest.raises(RunError, match=f"^{says}") as caught:
            process.call(_divide, 1.0, 0.0)
        assert "Traceback" in caught.value.__notes__[0]
        assert process.call(_divide, 1.0, 2.0) == 0.5


def test_errors_of_the_project_stay_what_they_are_with_their_traceback() -> None:
    with PinnedProcess("worker") as process:
        for kind in (StageError, PeerLost, ConfigError):
            with pytest.raises(kind) as caught:
                process.call(_fail, kind)
            assert str(caught.value) == "at fault" and "in _fail" in caught.value.__notes__[0]


def test_a_process_that_ends_is_an_error_with_its_exit_code() -> None:
    expected = r"worker ended \(exit code 7\) while it ran _end"
    with PinnedProcess("worker") as process:
        with pytest.raises(RunError, match=expected):
            process.call(_end)
        with pytest.raises(RunError, match=r"worker ended \(exit code 7\)"):
            process.call(_end)  # its end of the pipe is closed


def test_run_pinned_returns_the_result() -> None:
    assert run_pinned(_divide, 3.0, b=2.0) == 1.5
