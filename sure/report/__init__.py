"""One self-contained page from one or several evaluations."""

from sure.report.page import write_report

__all__ = ["write_report"]
