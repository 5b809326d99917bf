"""What is registered under names, for the fields of a configuration that take such names."""

from __future__ import annotations

from pipar_jax.aggregation.rules import RULE_NAMES
from pipar_jax.config import AUTO
from pipar_jax.config.schema import Names
from pipar_jax.data.partition import PARTITIONS
from pipar_jax.data.published import PUBLIC_SOURCES
from pipar_jax.methods.registry import METHODS

#: For each field its names; help lists them, and ``resolve`` takes no others where it says so.
NAMES: Names = {
    "method": (*METHODS, AUTO),
    "data.source": PUBLIC_SOURCES,
    "data.partition": tuple(PARTITIONS),
    "aggregation.rule": RULE_NAMES,
}
