"""What is trained and how: the network, its optimiser, its averages, its pipeline.

Annotations are real objects (no ``from __future__ import annotations``); see ``fields``.
"""

import dataclasses
from typing import Literal, get_args

from pipar_jax.config.schema import option
from pipar_jax.schedule.plan import Dispatch, HandOn, WeightPolicy
from stages.names import MODELS, NORMS, STEMS, TASKS

Labels = Literal["home", "end"]
#: Optimisers and schedules by name, in addition to functions of the user's (module:NAME:FUNCTION).
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine", "linear", "step")


@dataclasses.dataclass(slots=True)
class ModelConfig:
    """The network and its construction."""

    name: str = option("vgg5", f"network: {', '.join(MODELS)}, or your own: module:NAME:FUNCTION")
    args: str = option(
        "",
        "arguments of your own network's function, such as 'width=16 norm=group', or of gpt2: "
        "width, heads, depth, positions",
    )
    norm: str = option("batch", "normalisation layers", choices=NORMS)
    stem: str = option(
        "cifar",
        "first layers: cifar, for small images, or imagenet, the papers' (ResNet 7x7 with pooling, "
        "MobileNet stride 2)",
        choices=STEMS,
    )
    trainable: str = option(
        "",
        "train only the weights whose names (unit/path) match this regular expression, such as "
        "'lora|head'; the others stay as they are and never travel; empty: all",
    )
    dtype: str = option(
        "float32",
        "type in which the network computes and activations travel; with bfloat16 weights, "
        "gradients of weights, statistics and losses are float32",
        choices=("float32", "float64", "bfloat16"),
    )
    base: str = option(
        "",
        "safetensors file of which every host reads the weights of its units, in the layout of "
        "this project or, for gpt2, of Hugging Face; weights that are not in it come from the seed",
        path="",
    )
    weights: str = option(
        "",
        "start from the weights of a run, a checkpoint or a safetensors file; empty: from the seed",
        path="",
    )
    weights_match: str = option(
        "", "names of the weights to take, such as conv*/kernel; empty: all of the model's"
    )

    @property
    def weight_dtype(self) -> str:
        """The type of weights, samples, statistics and losses: at least float32."""
        return "float64" if self.dtype == "float64" else "float32"


@dataclasses.dataclass(slots=True)
class TaskConfig:
    """What the network is trained for: loss, metrics, and what targets have to be."""

    name: str = option(
        "classification", f"task: {', '.join(TASKS)}, or your own: module:NAME:FUNCTION"
    )
    args: str = option(
        "", "arguments of the task, such as 'label_smoothing=0.1 class_weights=[1,2.5] top_k=5'"
    )
    metrics: str = option(
        "",
        "metrics of all outputs to compute in evaluations, such as f1,auc,confusion, or all; those "
        "that stream are always computed",
    )


@dataclasses.dataclass(slots=True)
class LoraConfig:
    """Low-rank adapters on dense layers of a registered network; only they are trained."""

    match: str = option(
        "",
        "dense layers (unit/path) that get adapters: a regular expression, such as "
        "'attention/(inward|outward)'; empty: none",
    )
    rank: int = option(8, "inner size of the adapters", at_least=1, at_most=10_000)
    alpha: float = option(16.0, "adapters' output is multiplied by alpha / rank", above=0)


@dataclasses.dataclass(slots=True)
class OptimizerConfig:
    """The optimiser of every replica."""

    name: str = option(
        "sgd", f"optimiser: {', '.join(OPTIMIZERS)}, or your own: module:NAME:FUNCTION"
    )
    args: str = option("", "your own optimiser: arguments of its function, such as 'decay=0.9'")
    learning_rate: float = option(0.01, "learning rate (with a schedule: its peak)", above=0)
    groups: str = option(
        "",
        "factors of the learning rate of weights whose names (unit/path) match a regular "
        "expression, such as 'head=0.1 lora=10'; the first match counts, others have 1",
    )
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
    schedule: str = option(
        "constant",
        f"learning-rate schedule over the run: {', '.join(SCHEDULES)}, or your own: "
        "module:NAME:FUNCTION",
    )
    schedule_args: str = option(
        "", "your own schedule: arguments of its function, such as 'power=0.5'"
    )
    drop_every: int = option(1000, "schedule=step: steps between two drops", at_least=1)
    drop_factor: float = option(
        0.1, "schedule=step: factor of the learning rate at each drop", above=0
    )
    warmup_steps: int = option(0, "steps of linear warm-up before the schedule", at_least=0)


@dataclasses.dataclass(slots=True)
class AggregationConfig:
    """The interval and the rule by which weights are averaged."""

    every: str = option(
        "epoch", "aggregation interval: epoch, or a number of steps such as '10 steps'"
    )
    rule: str = option(
        "fedavg",
        "server optimiser applied to the averaged update: {names}, or your own: "
        "module:NAME:FUNCTION",
    )
    args: str = option("", "your own rule: arguments of its function, such as 'trim=1'")
    learning_rate: float = option(1.0, "server learning rate (adaptive rules: try 0.01)", above=0)
    momentum: float = option(
        0.9, "fedavgm: momentum; adaptive rules: first beta", at_least=0, below=1
    )
    beta2: float = option(0.99, "fedadam, fedyogi: second beta", at_least=0, below=1)
    epsilon: float = option(1e-3, "adaptive rules: added to the denominator", above=0)
    liars: int = option(
        0, "trimmed_mean, multi_krum: number of Byzantine devices to tolerate", at_least=0
    )
    update_bound: float = option(
        0.0,
        "fl: norm to which the server scales a device's larger update down; 0: no bound",
        at_least=0,
    )
    proximal_mu: float = option(0.0, "FedProx: weight of the proximal term", at_least=0)
    codec: str = option("raw", "codec for averaged weights on links")
    personal: str = option(
        "",
        "weights of the devices' own stages whose names (unit/path) match this regular expression, "
        "such as 'head', stay each device's own: never averaged, never sent; empty: none",
    )
    weighted: bool = option(True, "weight the average by samples; false: all devices count equally")


@dataclasses.dataclass(slots=True)
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
