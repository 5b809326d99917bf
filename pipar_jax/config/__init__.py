"""The configuration of a run: its fields, its hosts, its checks and its text.

A preset in ``configs/`` returns a ``Config``; the command line changes its fields
(``--config.data.batch_size=50``, ``--config.devices.1.link=4g``); ``resolve`` of
``pipar_jax.methods.resolution`` checks it as a whole and returns the complete copy that is printed,
saved with the run and passed to every host. Nothing here loads jax: launchers read configurations
before they set jax's environment.
"""

from __future__ import annotations

from pipar_jax.config.cohorts import keeps_state, may_lose, may_lose_nodes, places, quorum
from pipar_jax.config.data_fields import OWN_SOURCES, DataConfig
from pipar_jax.config.fields import AUTO, Config
from pipar_jax.config.host_fields import (
    HIDDEN_TOKEN,
    PLATFORMS,
    SLOWEST,
    DeviceConfig,
    DevicesConfig,
    NetworkConfig,
    NodeConfig,
    NodesConfig,
    ServerConfig,
)
from pipar_jax.config.hosts import Hosts, HostSpec
from pipar_jax.config.intervals import aggregate_steps
from pipar_jax.config.privacy_fields import PrivacyConfig
from pipar_jax.config.run_fields import (
    SELECTIONS,
    TRACED,
    CheckpointConfig,
    CohortConfig,
    RunConfig,
    StopConfig,
)
from pipar_jax.config.saved import (
    difference,
    from_dict,
    from_json,
    resume_difference,
    to_dict,
    to_json,
    to_text,
)
from pipar_jax.config.schema import LONGEST_S
from pipar_jax.config.training_fields import (
    AggregationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    TaskConfig,
)
from pipar_jax.config.tuner_fields import TunerConfig

__all__ = [
    "AUTO",
    "HIDDEN_TOKEN",
    "LONGEST_S",
    "OWN_SOURCES",
    "PLATFORMS",
    "SELECTIONS",
    "SLOWEST",
    "TRACED",
    "AggregationConfig",
    "CheckpointConfig",
    "CohortConfig",
    "Config",
    "DataConfig",
    "DeviceConfig",
    "DevicesConfig",
    "HostSpec",
    "Hosts",
    "LoraConfig",
    "ModelConfig",
    "NetworkConfig",
    "NodeConfig",
    "NodesConfig",
    "OptimizerConfig",
    "PipelineConfig",
    "PrivacyConfig",
    "RunConfig",
    "ServerConfig",
    "StopConfig",
    "TaskConfig",
    "TunerConfig",
    "aggregate_steps",
    "difference",
    "from_dict",
    "from_json",
    "keeps_state",
    "may_lose",
    "may_lose_nodes",
    "places",
    "quorum",
    "resume_difference",
    "to_dict",
    "to_json",
    "to_text",
]
