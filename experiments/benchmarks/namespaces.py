"""Real slow links on one machine: a network namespace behind a veth pair shaped by ``tc``."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import uuid
from types import TracebackType
from typing import Self

from pipar_jax.errors import RunError

#: Seconds that a command of ``ip`` or ``tc`` may take.
LIMIT_S = 30.0


def namespaces_work() -> bool:
    """Whether this process may make namespaces and shape links."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return False
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return False
    try:
        with ShapedNamespace(100.0, latency_ms=50):
            return True
    except RunError:  # root in a container without the right to administer networks
        return False


class ShapedNamespace:
    """A namespace reached over a link of a given rate both ways; a context manager.

    Args:
      rate_mbps: Rate of either direction.
      latency_ms: Maximum time of a packet in the queue of ``tbf``.

    Attributes:
      name: The namespace's name.
      near_address: Address of this side of the link.
      far_address: Address inside the namespace.
    """

    def __init__(self, rate_mbps: float, *, latency_ms: float) -> None:
        tag = uuid.uuid4().hex[:6]
        self.name = f"pipar{tag}"
        # One of 65,536 subnets of 10/8 by the random name, so that several runs do not collide.
        self._prefix = f"10.{int(tag[0:2], 16)}.{int(tag[2:4], 16)}"
        self.near_address = f"{self._prefix}.1"
        self.far_address = f"{self._prefix}.2"
        self._near, self._far = f"pn{tag}", f"pf{tag}"
        self._rate_mbps = rate_mbps
        self._latency_ms = latency_ms

    def __enter__(self) -> Self:
        """Makes the namespace and the link.

        Raises:
          RunError: If ``ip`` or ``tc`` fails; everything created is removed.
        """
        inside = ("ip", "netns", "exec", self.name)
        shape = (
            "tc", "qdisc", "add", "dev", "{}", "root", "tbf", "rate", f"{self._rate_mbps}mbit",
            "burst", "32kbit", "latency", f"{self._latency_ms}ms",
        )  # fmt: skip
        try:
            _run("ip", "netns", "add", self.name)
            _run("ip", "link", "add", self._near, "type", "veth", "peer", "name", self._far,
                 "netns", self.name)  # fmt: skip
            _run("ip", "addr", "add", f"{self.near_address}/24", "dev", self._near)
            _run("ip", "link", "set", self._near, "up")
            _run(*inside, "ip", "addr", "add", f"{self.far_address}/24", "dev", self._far)
            _run(*inside, "ip", "link", "set", self._far, "up")
            _run(*inside, "ip", "link", "set", "lo", "up")
            _run(*(part.format(self._near) for part in shape))
            _run(*inside, *(part.format(self._far) for part in shape))
        except BaseException:  # Ctrl-C as well: nobody else knows the names
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Removes namespace and link."""
        self._remove()

    def _remove(self) -> None:
        for command in (("ip", "link", "del", self._near), ("ip", "netns", "del", self.name)):
            with contextlib.suppress(subprocess.TimeoutExpired):  # the other one is still removed
                subprocess.run(command, capture_output=True, check=False, timeout=LIMIT_S)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{' '.join(command)} did not end within {LIMIT_S:g} s") from error
    if done.returncode:
        raise RunError(f"{' '.join(command)} failed: {done.stderr.strip()}")
