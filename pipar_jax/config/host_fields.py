"""The hosts of a run, and what is between them.

Annotations are real objects (no ``from __future__ import annotations``); see ``fields``.
"""

import dataclasses

from pipar_jax.config.schema import LONGEST_S, option
from pipar_jax.disk.json_text import JsonObject

PLATFORMS = ("auto", "cpu", "cuda", "tpu")
HIDDEN_TOKEN = "(hidden)"
SLOWEST = 1e6
#: Devices that a run may have.
MOST_DEVICES = 10_000


@dataclasses.dataclass(slots=True)
class HostConfig:
    """What every kind of host has."""

    slowdown: float = option(
        1.0, "multiply compute time by this factor", at_least=1, at_most=SLOWEST
    )
    cpus: str = option("", "CPU cores to run on, such as 0 or 1-3,5; empty: any")
    memory_mb: float = option(
        0.0, "memory limit for weights, activations and temporaries, in megabytes; plans above it "
        "are refused; 0: no limit",
        at_least=0,
    )  # fmt: skip
    platform: str = option("auto", "platform that jax computes on", choices=PLATFORMS)
    rematerialise: bool = option(False, "recompute forward passes instead of keeping residuals")


@dataclasses.dataclass(slots=True)
class DeviceConfig(HostConfig):
    """A device, or the defaults of all devices."""

    link: str = option(
        "none",
        "4g, 4g+, wifi, lan, none, UP/DOWN[/DELAYms] in Mbit/s, or trace:FILE, a CSV file of rates "
        "over time (time_s,up_mbps,down_mbps)",
        path="trace:",
    )
    slowdown_trace: str = option(
        "",
        "CSV file of additional slowdown factors over time (time_s,slowdown); empty: none",
        path="",
    )
    platform: str = option("cpu", "platform that jax computes on", choices=PLATFORMS)
    cut: int | str | None = option(None, "cut of this device; none: pipeline.cut")
    micro_batches: int | None = option(
        None, "micro-batches of this device; none: pipeline.micro_batches", at_least=1
    )
    data_source: str | None = option(
        None, "data of this device; none: data.source", path=("npz:", "npy:")
    )


@dataclasses.dataclass(slots=True)
class DevicesConfig:
    """The number of devices, their defaults, and overrides of single devices.

    Attributes:
      overrides: Maps a device's index to the overridden fields: ``{1: {"link": "4g"}}``.
      total: The number of devices that may register.
    """

    count: int = option(2, "number of devices", at_least=1, at_most=MOST_DEVICES)
    more: int = option(
        0,
        "devices that may register in addition, at the start or later, with data of their own: "
        "each has a place of its own (cohort.size=0) or may be chosen for a round",
        at_least=0,
        at_most=MOST_DEVICES,
    )
    defaults: DeviceConfig = dataclasses.field(default_factory=DeviceConfig)
    overrides: dict[int, JsonObject] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        """The number of devices that may register."""
        return self.count + self.more


@dataclasses.dataclass(slots=True)
class NodeConfig(HostConfig):
    """A compute node in the middle of chains, or the defaults of all nodes."""

    host: str = option("127.0.0.1", "address at which its neighbours reach it")
    port: int = option(0, "port to listen on; 0: any free port", at_least=0, at_most=65535)
    link: str = option(
        "none", "link to the next node; the same forms as for a device", path="trace:"
    )


@dataclasses.dataclass(slots=True)
class NodesConfig:
    """The number of compute nodes, counted from 1, their defaults, and overrides of single nodes.

    Attributes:
      overrides: Maps a node's index to the overridden fields: ``{2: {"slowdown": 4.0}}``.
    """

    count: int = option(0, "number of compute nodes in a chain", at_least=0, at_most=1000)
    replicate_every: int = option(
        0,
        "rounds between copies on the server of what compute nodes alone have (weights, "
        "statistics, optimiser states), from which a run goes on when a node is lost; 0: no "
        "copies: a run that may lose devices (cohort.*) goes on with the weights of the last "
        "evaluation and fresh optimiser states, any other ends",
        at_least=0,
    )
    defaults: NodeConfig = dataclasses.field(default_factory=NodeConfig)
    overrides: dict[int, JsonObject] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class ServerConfig(HostConfig):
    """The host that coordinates the run and computes the far end of two-host chains."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(0, "port to listen on; 0: any free port", at_least=0, at_most=65535)


@dataclasses.dataclass(slots=True)
class NetworkConfig:
    """Authentication, encryption, and time limits between hosts."""

    token: str | None = option(
        None,
        "shared secret of at least 8 characters; env:NAME and file:PATH read it from there",
        path="file:",
    )
    insecure: bool = option(False, "allow listening beyond this machine without a token")
    authority: str = option(
        "", "TLS: PEM file of the certificate authority that signed the peer's certificate", path=""
    )
    certificate: str = option(
        "", "TLS: PEM file of this host's certificate; the server needs one", path=""
    )
    key: str = option("", "TLS: PEM file of this host's private key", path="")
    require_certificate: bool = option(
        False,
        "TLS: listeners (server, nodes) require a certificate of everyone who connects",
    )
    checksum: str = option(
        "auto",
        "send a checksum with every payload; auto: on without TLS, which has its own",
        choices=("auto", "on", "off"),
    )
    resume_s: float = option(
        0.0,
        "seconds within which a broken link may reconnect and resume; 0: a broken link is lost",
        at_least=0,
        at_most=LONGEST_S,
    )
    deadline_s: float = option(
        10.0, "seconds of silence after which a peer is lost", above=0, at_most=LONGEST_S
    )
    join_timeout_s: float = option(
        60.0, "seconds to wait for a host to join", above=0, at_most=LONGEST_S
    )
    progress_s: float = option(
        0.0,
        "seconds without progress after which a run ends even if all peers answer; 0: 300, or 20 "
        "times the longest action if that is longer",
        at_least=0,
        at_most=LONGEST_S,
    )
    working_s: float = option(
        7200.0,
        "seconds for which a host that is waited for may report that it compiles, times itself, "
        "tunes or evaluates, or keep a transfer going, without an answer or a completed action; "
        "after that only these are progress (progress_s)",
        above=0,
        at_most=LONGEST_S,
    )
    rejoin_s: float = option(
        0.0,
        "seconds for which a device or compute node tries to come back after it lost the server; "
        "0: it ends",
        at_least=0,
        at_most=LONGEST_S,
    )
