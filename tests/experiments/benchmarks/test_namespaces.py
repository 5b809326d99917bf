"""Namespaces are removed however their making ends."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from experiments.benchmarks import namespaces
from pipar_jax.errors import RunError


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (subprocess.TimeoutExpired("ip", namespaces.LIMIT_S), RunError),
    ],
)
@pytest.mark.parametrize("at", [0, 1, 8])
def test_what_was_made_is_removed(
    at: int, error: BaseException, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []

    def run(command: tuple[str, ...], **_: object) -> SimpleNamespace:
        commands.append(command)
        if len(commands) == at + 1:
            raise error
        if command[:3] == ("ip", "link", "del"):  # nor may this one keep the other from its turn
            raise subprocess.TimeoutExpired("ip", namespaces.LIMIT_S)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(namespaces.subprocess, "run", run)
    with pytest.raises(raised), namespaces.ShapedNamespace(10.0, latency_ms=50) as space:
        pytest.fail(f"{space.name} was made")
    name = commands[0][3]
    assert commands[at + 1 :][-1] == ("ip", "netns", "del", name)
    assert commands[at + 1][:3] == ("ip", "link", "del")
