"""The look for leaks finds what it is there to find."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading

import pytest

from tests.conftest import Resources, held


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
