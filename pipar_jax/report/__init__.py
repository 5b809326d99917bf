"""One or more runs, side by side, as a self-contained HTML file."""

from pipar_jax.report.page import make_page, write_report
from pipar_jax.report.run import RecordedRun, read_run

__all__ = ["RecordedRun", "make_page", "read_run", "write_report"]
