"""The search for a plan.

Annotations are real objects (no ``from __future__ import annotations``); see ``fields``.
"""

import dataclasses

from pipar_jax.config.schema import LONGEST_S, option


@dataclasses.dataclass(slots=True)
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
        "safe",
        "codecs to choose from, such as raw,float16; raw: none; safe, with method=auto: bits:K as "
        "needed for convolutional classifiers, see docs/codecs.md; auto: bits:K as needed, down to "
        "activation_bits and cotangent_bits; empty: those of pipeline",
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
