"""The fields of a run's configuration, as plain dataclasses that a preset fills in.

Annotations are real objects (no ``from __future__ import annotations``): ml_collections reads the
types of the fields it overrides.
"""

import dataclasses
from typing import Literal, get_args

from pipar_jax.config.schema import REGISTERED, option
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.schedule.plan import Dispatch, HandOn, WeightPolicy
from stages.names import MODELS, NORMS, STEMS

#: Value of ``method`` with which the tuner chooses method and plan.
AUTO = "auto"
#: Prefixes of the user's own data.
OWN_SOURCES = ("npz:", "module:")
Labels = Literal["home", "end"]
#: Ways to choose a round's cohort, in addition to a function of the user's (module:NAME:FUNCTION).
SELECTIONS = ("uniform", "by_samples")
PLATFORMS = ("auto", "cpu", "cuda", "tpu")
SCORES = ("accuracy", "loss")
TRACED = ("all", "ends", "none")
HIDDEN_TOKEN = "(hidden)"
#: Upper bound of all times in seconds; operating systems support waits of this length reliably.
LONGEST_S = 1e6
SLOWEST = 1e6


@dataclasses.dataclass
class ModelConfig:
    """The network and its construction."""

    name: str = option("vgg5", f"network: {', '.join(MODELS)}, or your own: module:NAME:FUNCTION")
    args: str = option(
        "", "your own network: arguments of its function, such as 'width=16 norm=group'"
    )
    norm: str = option("batch", "normalisation layers", choices=NORMS)
    stem: str = option("cifar", "first layers of a ResNet: 3x3, or 7x7 with pooling", choices=STEMS)
    trainable: str = option(
        "",
        "train only the weights whose names (unit/path) match this regular expression, such as "
        "'lora|head'; the others stay as they are and never travel; empty: all",
    )
    dtype: str = option(
        "float32", "type of weights and activations", choices=("float32", "float64")
    )
    weights: str = option(
        "",
        "start from the weights of a run, a checkpoint or a safetensors file; empty: from the seed",
        path="",
    )
    weights_match: str = option(
        "", "names of the weights to take, such as conv*/kernel; empty: all of the model's"
    )


@dataclasses.dataclass
class DataConfig:
    """The samples and their partition among the devices."""

    source: str = option(
        "digits",
        "data set: {names}, or your own: npz:PATH or module:NAME:FUNCTION "
        "({device} in it is replaced by the device's index)",
        path="npz:",
    )
    test_source: str = option(
        "",
        "own data: where the server reads the test set (npz:PATH, module:NAME:FUNCTION); "
        "empty: the same as `source`",
        path="npz:",
    )
    classes: int = option(
        0,
        "own data: number of classes; 0: as given by the data, or the highest label + 1",
        at_least=0,
    )
    scale: float = option(
        0.0,
        "own data: divisor of stored numbers, for instance 255 for pixels; 0: as given by the data",
        at_least=0,
    )
    data_dir: str = option(
        "",
        "folder of public data sets, as published or as prepared by TFDS; empty: TFDS's default, "
        "then the user's cache folder",
        path="",
    )
    download: bool = option(
        True, "download a missing public data set into data_dir, or into the user's cache folder"
    )
    cache_dir: str = option(
        "", "folder for decoded arrays; empty: the user's cache folder", path=""
    )
    partition: str = option(
        "iid", "partition of a public data set among the devices", choices=REGISTERED
    )
    alpha: float = option(
        0.5, "dirichlet, quantity: concentration; smaller values are more unequal", above=0
    )
    shards_per_device: int = option(2, "labels: number of label shards per device", at_least=1)
    train_samples: int = option(
        0, "use only this many training samples in total; 0: all", at_least=0
    )
    test_samples: int = option(0, "use only this many test samples; 0: all", at_least=0)
    augment: str = option(
        "none",
        "augmentation; crop_flip: shift by up to 4 pixels and flip horizontally",
        choices=("none", "crop_flip"),
    )
    max_samples: int = option(
        10_000_000,
        "largest number of samples that the server accepts from one device",
        at_least=1,
    )
    batch_size: int = option(100, "samples per mini-batch on one device", at_least=1)
    drop_last: bool = option(False, "drop the incomplete last mini-batch of an epoch")


@dataclasses.dataclass
class OptimizerConfig:
    """The optimiser of every replica."""

    name: str = option("sgd", "optimiser", choices=("sgd", "adam", "adamw"))
    learning_rate: float = option(0.01, "learning rate (with a schedule: its peak)", above=0)
    momentum: float = option(0.9, "sgd: momentum; adam: first beta", at_least=0, below=1)
    nesterov: bool = option(False, "use Nesterov momentum")
    beta2: float = option(0.999, "adam: second beta", at_least=0, below=1)
    epsilon: float = option(1e-8, "adam: added to the denominator", above=0)
    weight_decay: float = option(0.0, "L2 (sgd, adam) or decoupled (adamw) decay", at_least=0)
    clip_norm: float | None = option(
        None,
        "clip each replica's gradient, over all its units, to this global norm; under a cut each "
        "stage is a replica",
        above=0,
    )
    decay: str = option(
        "constant", "learning-rate schedule over the run", choices=("constant", "cosine", "linear")
    )
    warmup_steps: int = option(0, "steps of linear warm-up", at_least=0)


@dataclasses.dataclass
class AggregationConfig:
    """The interval and the rule by which weights are averaged."""

    every: str = option(
        "epoch", "aggregation interval: epoch, or a number of steps such as '10 steps'"
    )
    rule: str = option(
        "fedavg", "server optimiser applied to the averaged update", choices=REGISTERED
    )
    learning_rate: float = option(1.0, "server learning rate (adaptive rules: try 0.01)", above=0)
    momentum: float = option(
        0.9, "fedavgm: momentum; adaptive rules: first beta", at_least=0, below=1
    )
    beta2: float = option(0.99, "fedadam, fedyogi: second beta", at_least=0, below=1)
    epsilon: float = option(1e-3, "adaptive rules: added to the denominator", above=0)
    proximal_mu: float = option(0.0, "FedProx: weight of the proximal term", at_least=0)
    codec: str = option("raw", "codec for averaged weights on links")
    weighted: bool = option(True, "weight the average by samples; false: all devices count equally")


@dataclasses.dataclass
class PipelineConfig:
    """The cuts of the model and the flow of mini-batches through its stages."""

    cut: int | str = option(1, "number of units on the device, or the name of its last unit")
    cuts: str = option(
        "", "chains of compute nodes: all cuts, such as 2,5,9 (or names); empty: planned"
    )
    labels: str = option(
        "home",
        "chains of compute nodes that can: home keeps the last stage, and so the labels, on the "
        "device; end sends the labels "
        "to the last node",
        choices=get_args(Labels),
    )
    micro_batches: int = option(4, "pipelined methods: micro-batches per mini-batch", at_least=1)
    weights: str = option(
        "copy",
        "weights of a stage that serves several devices: copy (one per device, averaged) or "
        "shared (one for all, with gradients summed over the devices)",
        choices=tuple(map(str, WeightPolicy)),
    )
    in_flight: int = option(
        0,
        "shared weights: maximum number of micro-batches in flight in a stage; 0: no limit",
        at_least=0,
    )
    dispatch: str = option(
        "fcfs", "policy that chooses among ready actions", choices=tuple(map(str, Dispatch))
    )
    hand_on: str = option(
        "epoch",
        "devices in turns: when the client-side model passes to the next device",
        choices=tuple(map(str, HandOn)),
    )
    activation_codec: str = option(
        "raw", "codec for activations on links: raw, bfloat16, float16, int8, int4, bits:6, …"
    )
    cotangent_codec: str = option("raw", "codec for cotangents on links")
    window_mb: float = option(
        32.0,
        "credit of a link: megabytes that may be sent and not yet consumed",
        at_least=1e-6,
        at_most=1e6,
    )


@dataclasses.dataclass
class HostConfig:
    """What every kind of host has."""

    slowdown: float = option(
        1.0, "multiply compute time by this factor", at_least=1, at_most=SLOWEST
    )
    cpus: str = option("", "CPU cores to run on, such as 0 or 1-3,5; empty: any")
    memory_mb: float = option(
        0.0, "auto: memory limit for plans, in megabytes; 0: no limit", at_least=0
    )
    platform: str = option("auto", "platform that jax computes on", choices=PLATFORMS)
    rematerialise: bool = option(False, "recompute forward passes instead of keeping residuals")


@dataclasses.dataclass
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
    data_source: str | None = option(None, "data of this device; none: data.source", path="npz:")


@dataclasses.dataclass
class DevicesConfig:
    """The number of devices, their defaults, and overrides of single devices.

    Attributes:
      overrides: Maps a device's index to the overridden fields: ``{1: {"link": "4g"}}``.
    """

    count: int = option(2, "number of devices", at_least=1, at_most=10_000)
    defaults: DeviceConfig = dataclasses.field(default_factory=DeviceConfig)
    overrides: dict[int, JsonObject] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class NodeConfig(HostConfig):
    """A compute node in the middle of chains, or the defaults of all nodes."""

    host: str = option("127.0.0.1", "address at which its neighbours reach it")
    port: int = option(0, "port to listen on; 0: any free port", at_least=0, at_most=65535)
    link: str = option(
        "none", "link to the next node; the same forms as for a device", path="trace:"
    )
    memory_mb: float = option(
        0.0, "memory limit for weights, activations and temporaries, in megabytes; plans above it "
        "are refused; 0: no limit",
        at_least=0,
    )  # fmt: skip


@dataclasses.dataclass
class NodesConfig:
    """The number of compute nodes, counted from 1, their defaults, and overrides of single nodes.

    Attributes:
      overrides: Maps a node's index to the overridden fields: ``{2: {"slowdown": 4.0}}``.
    """

    count: int = option(0, "number of compute nodes in a chain", at_least=0, at_most=1000)
    defaults: NodeConfig = dataclasses.field(default_factory=NodeConfig)
    overrides: dict[int, JsonObject] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class CohortConfig:
    """Which devices train in a round, when a round is over, and what becomes of lost devices."""

    size: float = option(
        0.0,
        "devices in a round: a number, or below 1 a share of devices.count; 0: all that are there",
        at_least=0,
    )
    select: str = option(
        "uniform",
        f"how they are chosen: {', '.join(SELECTIONS)}, or module:NAME:FUNCTION",
    )
    min_devices: int = option(0, "devices with which a run may begin; 0: all", at_least=0)
    quorum: int = option(
        0, "devices that have to finish a round; the rest may be lost or late; 0: all", at_least=0
    )
    deadline_s: float = option(
        0.0,
        "seconds after which a round goes on without those that are late; 0: no deadline",
        at_least=0,
        at_most=LONGEST_S,
    )
    first: int = option(
        0, "end a round when so many devices have finished it; 0: wait for all", at_least=0
    )
    below: str = option(
        "end",
        "with fewer than the quorum: end the run; repeat the round when the quorum is there; or "
        "wait for those that are late, then repeat",
        choices=("end", "repeat", "wait"),
    )
    wait_s: float = option(
        10.0,
        "seconds to wait for more devices: at the start beyond min_devices, later for the quorum",
        at_least=0,
        at_most=LONGEST_S,
    )
    optimizer_state: str = option(
        "auto",
        "optimiser state of a device that is dropped from a round: keep that of the round's start, "
        "which takes a second copy, or reset it; auto: keep, and reset where size samples devices",
        choices=("auto", "keep", "reset"),
    )
    script: str = option(
        "", "membership.jsonl of a run whose losses are replayed; empty: none", path=""
    )


@dataclasses.dataclass
class ServerConfig(HostConfig):
    """The host that coordinates the run and computes the far end of two-host chains."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(0, "port to listen on; 0: any free port", at_least=0, at_most=65535)


@dataclasses.dataclass
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
        False, "TLS: the server requires a certificate from devices as well"
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
    rejoin_s: float = option(
        0.0,
        "seconds for which a device tries to come back after it lost the server; 0: it ends",
        at_least=0,
        at_most=LONGEST_S,
    )


@dataclasses.dataclass
class TunerConfig:
    """How method=auto and pipar plan search for the plan with the shortest epoch."""

    select: str = option(
        "search", "search all plans, or use the paper's own formulas", choices=("search", "paper")
    )
    times: str = option(
        "profiled",
        "compute times of hosts: profile every unit, or predict them from a few reference layers",
        choices=("profiled", "predicted"),
    )
    methods: str = option("fl,sl,sfl,pipar", "methods to choose from")
    micro_batches: str = option("2,3,4,5,6,8,10,12,16,20", "numbers of micro-batches to try")
    dispatch: str = option(
        "fcfs,fixed,backward_first,slowest_first", "dispatch policies to choose from"
    )
    codecs: str = option(
        "",
        "codecs to choose from, such as raw,float16; auto: bits:K as needed; empty: see pipeline",
    )
    activation_bits: int = option(
        4, "minimum bits per activation element, sign included", at_least=2, at_most=24
    )
    cotangent_bits: int = option(
        8, "minimum bits per cotangent element, sign included", at_least=2, at_most=24
    )
    actions: int = option(
        120_000,
        "limit on simulated actions, at which the search ends and reports its gap",
        at_least=1,
    )
    sizes: str = option("auto", "micro-batch sizes at which hosts are timed, such as 5,25,100")
    cache: bool = option(True, "cache measured times in the user's cache folder")
    adapt: bool = option(
        False,
        "change the plan during a run when another one is faster, if devices train in parallel: "
        "units move between devices, server and compute nodes",
    )
    gain: float = option(
        0.1, "adapt: fraction of the time that another plan must save", above=0, below=1
    )
    look_s: float = option(
        2.0, "adapt: seconds between two checks of speeds and links", above=0, at_most=LONGEST_S
    )


@dataclasses.dataclass
class CheckpointConfig:
    """What of a run is kept on disk, so that it can go on after a crash or an interruption."""

    every_rounds: int = option(0, "rounds between checkpoints; 0: none by rounds", at_least=0)
    every_s: float = option(
        0.0, "seconds between checkpoints; 0: none by time", at_least=0, at_most=LONGEST_S
    )
    keep: int = option(3, "newest checkpoints to keep", at_least=1)
    best: str = option(
        "",
        "keep the best checkpoint as well: with the highest accuracy or the lowest loss on the "
        "test set; empty: none",
        choices=("", *SCORES),
    )
    device_state: str = option(
        "device",
        "where optimiser states of devices and nodes are kept: on their own disks, or pulled to "
        "the server",
        choices=("device", "server"),
    )


@dataclasses.dataclass
class StopConfig:
    """When a run ends before its last round."""

    metric: str = option("accuracy", "score on the test set that counts", choices=SCORES)
    patience: int = option(
        0, "evaluations without a better score after which the run ends; 0: never", at_least=0
    )
    target: float | None = option(None, "score at which the run ends; none: no target")
    when: str = option(
        "", "your own MODULE:FUNCTION, called with every event: the run ends once it returns true"
    )


@dataclasses.dataclass
class RunConfig:
    """Files and events of a run."""

    dir: str = option(
        "runs", "parent folder of all runs; each run has a folder of its own", path=""
    )
    resume: str = option(
        "",
        "go on from a checkpoint: auto (the newest of this run's folder, if it has one), or the "
        "folder of a run or of one of its checkpoints; empty: begin anew",
        path="",
        words=("auto",),
    )
    trace: str = option(
        "all",
        "record the time of every action: in all rounds, at both ends of the run (the first and "
        "the last three rounds), or not at all",
        choices=TRACED,
    )
    sinks: str = option(
        "",
        "further destinations of events: tensorboard, or your own MODULE:FUNCTION",
    )
    compile_cache: bool = option(True, "cache compiled programs in the user's cache folder")
    evaluate_every: int = option(
        1, "rounds between evaluations; 0: only after the last round", at_least=0
    )
    rounds: int = option(
        0, "rounds to train, instead of `epochs`; 0: as many as the epochs have", at_least=0,
        at_most=10**6,
    )  # fmt: skip
    nonfinite: str = option(
        "end",
        "when a loss or weights are not finite: end the run, ignore it except for an event, or "
        "drop the device from the round",
        choices=("end", "ignore", "drop"),
    )
    progress_every_s: float = option(
        0.5, "seconds between progress events", at_least=0, at_most=LONGEST_S
    )


@dataclasses.dataclass
class Config:
    """The configuration of a run."""

    name: str = option("run", "name of the run and of its folder")
    seed: int = option(0, "seed of all random numbers", at_least=0, below=2**32)
    method: str = option("pipar", "training method; auto: chosen by the tuner", choices=REGISTERED)
    epochs: int = option(1, "number of passes of each device over its samples", at_least=1)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    aggregation: AggregationConfig = dataclasses.field(default_factory=AggregationConfig)
    pipeline: PipelineConfig = dataclasses.field(default_factory=PipelineConfig)
    devices: DevicesConfig = dataclasses.field(default_factory=DevicesConfig)
    nodes: NodesConfig = dataclasses.field(default_factory=NodesConfig)
    cohort: CohortConfig = dataclasses.field(default_factory=CohortConfig)
    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    tuner: TunerConfig = dataclasses.field(default_factory=TunerConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    stop: StopConfig = dataclasses.field(default_factory=StopConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    debug: bool = option(False, "show tracebacks")
