"""Shows the results of a run, from the files in its folder: a table and one offline HTML page."""

from fedpress.reports.html import write_report
from fedpress.reports.stage_table import rich_table

__all__ = ["rich_table", "write_report"]
