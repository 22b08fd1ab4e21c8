"""Reports on one run, read from its folder: closing table, verdict, figures and HTML page."""

from hftlight.report.card import write_cards
from hftlight.report.claims import verdict
from hftlight.report.html.page import write_report
from hftlight.report.result import Result, read_result
from hftlight.report.table import closing_markdown, closing_table, closing_text

__all__ = [
    "Result",
    "closing_markdown",
    "closing_table",
    "closing_text",
    "read_result",
    "verdict",
    "write_cards",
    "write_report",
]
