"""A run folder becomes a table and one offline HTML page; nothing but the folder is read."""

from fedpress.reports.html import write_report
from fedpress.reports.stage_table import rich_table

__all__ = ["rich_table", "write_report"]
