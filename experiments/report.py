"""Writes one self-contained HTML file about a run, or about several beside each other.

  pipar report runs/quickstart-fl runs/quickstart-pipar --output=report.html

It shows the results, learning curves against epochs and seconds, one step as a Gantt chart, idle
time by cause, bytes per link, predicted beside measured times, and the configurations.
"""

import pathlib

from pipar_jax.errors import ConfigError
from pipar_jax.launch import plain_flags
from pipar_jax.report import write_report

_OUTPUT = plain_flags.define_path(
    "output", None, "The file to write; by default report.html in the first run's folder."
)


def main(names: list[str]) -> None:
    """Writes the report of the runs named on the command line.

    Raises:
      ConfigError: No run is named.
      PiparError: A run cannot be read, or the report not be written.
    """
    folders = [pathlib.Path(name).expanduser() for name in names]
    if not folders:
        raise ConfigError("name at least one run's folder, such as runs/quickstart-pipar")
    target = _OUTPUT.value or folders[0] / "report.html"
    write_report(folders, target)
    print(f"wrote {target}")


if __name__ == "__main__":
    plain_flags.run(main, takes="RUN...")
