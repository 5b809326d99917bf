"""The configuration of a run: its sections, and the fields that stand alone.

Each section has a file: ``training_fields``, ``data_fields``, ``host_fields``, ``run_fields``,
``tuner_fields``, ``privacy_fields``. All are plain dataclasses that a preset fills in, and their
annotations are real objects (no ``from __future__ import annotations``): ml_collections reads the
types of the fields it overrides.
"""

import dataclasses

from pipar_jax.config.data_fields import DataConfig
from pipar_jax.config.host_fields import DevicesConfig, NetworkConfig, NodesConfig, ServerConfig
from pipar_jax.config.privacy_fields import PrivacyConfig
from pipar_jax.config.run_fields import CheckpointConfig, CohortConfig, RunConfig, StopConfig
from pipar_jax.config.schema import REGISTERED, option
from pipar_jax.config.training_fields import (
    AggregationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    TaskConfig,
)
from pipar_jax.config.tuner_fields import TunerConfig

#: Value of ``method`` with which the tuner chooses method and plan.
AUTO = "auto"


@dataclasses.dataclass(slots=True)
class Config:
    """The configuration of a run."""

    name: str = option("run", "name of the run and of its folder")
    seed: int = option(0, "seed of all random numbers", at_least=0, below=2**32)
    method: str = option("pipar", "training method; auto: chosen by the tuner", choices=REGISTERED)
    epochs: int = option(1, "number of passes of each device over its samples", at_least=1)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    aggregation: AggregationConfig = dataclasses.field(default_factory=AggregationConfig)
    pipeline: PipelineConfig = dataclasses.field(default_factory=PipelineConfig)
    devices: DevicesConfig = dataclasses.field(default_factory=DevicesConfig)
    nodes: NodesConfig = dataclasses.field(default_factory=NodesConfig)
    cohort: CohortConfig = dataclasses.field(default_factory=CohortConfig)
    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
    tuner: TunerConfig = dataclasses.field(default_factory=TunerConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    stop: StopConfig = dataclasses.field(default_factory=StopConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    debug: bool = option(False, "show tracebacks")
