"""Writes a report of one or more runs as one self-contained HTML file.

  pipar report runs/quickstart-fl runs/quickstart-pipar --output=report.html

It shows results, learning curves over epochs and seconds, one step as a Gantt chart, idle time by
cause, traffic by link, predicted and measured times, and the configurations.
"""

import pathlib

from pipar_jax.errors import ConfigError
from pipar_jax.launch import plain_flags
from pipar_jax.report import write_report

_OUTPUT = plain_flags.define_path(
    "output", None, "File to write; by default report.html in the first run's folder."
)


def main(names: list[str]) -> None:
    """Writes the report of the runs named on the command line.

    Raises:
      ConfigError: No run is named.
      PiparError: A run cannot be read, or the report cannot be written.
    """
    folders = [pathlib.Path(name).expanduser() for name in names]
    if not folders:
        raise ConfigError("name at least one run's folder, such as runs/quickstart-pipar")
    target = _OUTPUT.value or folders[0] / "report.html"
    write_report(folders, target)
    print(f"wrote {target}")


if __name__ == "__main__":
    plain_flags.run(main, takes="RUN...")
