"""The look for leaks finds what it is there to find."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading

import pytest

from tests.conftest import Resources, held, pytest_collection_modifyitems


def test_a_thread_is_seen_until_it_ends() -> None:
    before = Resources.held()
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="left-behind")
    thread.start()
    try:
        assert "left-behind" in str(Resources.held().beyond(before))
    finally:
        release.set()
        thread.join()
    assert not any(Resources.held().beyond(before))


def test_a_socket_is_seen_until_it_is_closed() -> None:
    before = Resources.held()
    with socket.socket():
        if sys.platform.startswith("linux"):
            assert len(Resources.held().beyond(before).sockets) == 1
    assert not any(Resources.held().beyond(before))


def test_a_child_process_is_seen_until_it_is_waited_for() -> None:
    before = Resources.held()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert [pid for pid, _ in Resources.held().beyond(before).children] == [child.pid]
    finally:
        child.communicate(b"\n")
    assert not any(Resources.held().beyond(before))


def test_a_limit_of_time_is_held_where_durations_say_something() -> None:
    def clock(*seconds: float):
        return iter(seconds).__next__

    with held(True, 3.0, clock(10.0, 12.9)):
        pass
    late = pytest.raises(AssertionError, match=r"took 5\.00 s, not 3 s")
    with late, held(True, 3.0, clock(10.0, 15.0)):
        pass
    with held(False, 3.0, clock(10.0, 15.0)):
        pass


class Case:
    """What is asked of a case of a list."""

    def __init__(self, number: int, *args: int, soak: bool = False) -> None:
        self.nodeid, self.fixturenames = f"tests/test_x.py::test_y[{number}]", ()
        self.marks = {"sampled": pytest.mark.sampled(*args).mark}
        if soak:
            self.add_marker(pytest.mark.soak)

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self.marks.get(name)

    def add_marker(self, made: pytest.MarkDecorator) -> None:
        self.marks[made.name] = made.mark


@pytest.mark.parametrize(("args", "run"), [((3,), [0, 3, 7]), ((3, 1), [1, 5, 8]), ((1,), None)])
def test_a_sample_of_a_list_is_run_and_all_of_it_in_soak(args, run) -> None:
    cases = [Case(number, *args, soak=number == 4) for number in range(9)]
    pytest_collection_modifyitems(cases)
    kept = [number for number, case in enumerate(cases) if "soak" not in case.marks]
    assert kept == ([n for n in range(9) if n != 4] if run is None else run)
