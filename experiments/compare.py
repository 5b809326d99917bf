"""Trains one preset by several methods on this machine and compares them in a table and a report.

Only the method differs: all runs have the same data, initial weights, links and emulated slowdowns.
The runs are named after the preset and the method; the report is one HTML file next to them.
"""

import dataclasses
import pathlib

import configs
from pipar_jax import data
from pipar_jax.config import Config, to_text
from pipar_jax.config.schema import option
from pipar_jax.launch import compare, flags
from pipar_jax.methods.registry import title
from pipar_jax.report import comparison
from pipar_jax.report.console import make_console


@dataclasses.dataclass
class Extra:
    """Flags of this binary."""

    methods: str = option(
        "",
        "methods to compare, in this order, separated by commas; empty: fl, sl, sfl, pipar and the "
        "preset's own, as far as the preset allows",
    )


def main(config: Config, extra: Extra) -> None:
    """Trains by each method, prints the table and writes the report.

    Raises:
      PiparError: A method does not fit the preset, or a run failed.
    """
    methods = comparison.choose_methods(config, extra.methods)
    compare.check(config, methods)
    print(to_text(config), flush=True)
    if table := data.table(config):
        print(f"\n{table}", flush=True)
    console = make_console(compare.PLAIN_WIDTH)
    console.print(f"\nMethods: {', '.join(map(title, methods))}\n")
    compare.compare(config, methods, console)


if __name__ == "__main__":
    flags.run(
        main,
        Extra,
        doc=__doc__,
        name="compare",
        presets=pathlib.Path(configs.__file__).parent,
    )
