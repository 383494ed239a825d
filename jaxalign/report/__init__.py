"""The report of a run: `write(workdir)` makes report.html, `console(evaluation)` the same verdicts for a terminal."""

from jaxalign.report.page import write
from jaxalign.report.verdict import console

__all__ = ["console", "write"]
