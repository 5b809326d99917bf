"""Writes one self-contained HTML file about a run, or about several beside each other.

  python -m experiments.report runs/quickstart-fl runs/quickstart-pipar --output=report.html

It shows the results, learning curves against epochs and seconds, one step as a Gantt chart, idle
time by cause, bytes per link, predicted beside measured times, and the configurations.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

from pipar_jax.errors import PiparError
from pipar_jax.report import write_report

_OUTPUT = flags.DEFINE_string(
    "output", None, "The file to write; by default report.html in the first run's folder."
)


def main(argv: Sequence[str]) -> None:
    """Writes the report of the runs named on the command line."""
    folders = [pathlib.Path(name) for name in argv[1:]]
    if not folders:
        raise app.UsageError("name at least one run's folder, such as runs/quickstart-pipar")
    target = pathlib.Path(_OUTPUT.value) if _OUTPUT.value else folders[0] / "report.html"
    try:
        write_report(folders, target)
    except PiparError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {target}")


if __name__ == "__main__":
    app.run(main)
