"""Writes a report of one or more runs as one self-contained HTML file.

  pipar report runs/quickstart-fl runs/quickstart-pipar --output=report.html

It shows results, learning curves over epochs and seconds, one step as a Gantt chart, idle time by
cause, traffic by link, predicted and measured times, and the configurations.
"""

import os

from pipar_jax.disk import files
from pipar_jax.errors import ConfigError
from pipar_jax.launch import plain_flags
from pipar_jax.launch.binary import wrong_use
from pipar_jax.report import write_report

_OUTPUT = plain_flags.define_path(
    "output",
    None,
    "File to write; by default report.html in the first run's folder, numbered if it is taken.",
)


def main(names: list[str]) -> None:
    """Writes the report of the runs named on the command line.

    Raises:
      ConfigError: No run is named, what is named cannot be read as one, or the file cannot be
        written.
      DiskError: Writing the file failed.
    """
    folders = [plain_flags.as_path(name) for name in names]
    if not folders:
        raise ConfigError("name at least one run's folder, such as runs/quickstart-pipar")
    target = _OUTPUT.value or files.unused(folders[0], "report", ".html")
    if _OUTPUT.value or os.path.isdir(folders[0]):
        files.check_target(target, f"--output={target}")
    with wrong_use():
        write_report(folders, target, "choose another file with --output")
    print(f"wrote {target}")


if __name__ == "__main__":
    plain_flags.run(main, takes="RUN...")
