"""Benchmark results as a page, Markdown, CSV and JSON; traces of all ranks merged into one.

`Measurements.read` reads the documents of a directory; `page`, `markdown`, `csv_text` and `json_document` write them
down. Documents may come from anywhere: a number that is none counts as missing, and every text is escaped.
"""

from .documents import Measurements
from .merged_trace import MergedTrace, merged_trace
from .page import page
from .text_formats import chart_files, csv_text, json_document, markdown

__all__ = [
    "Measurements", "MergedTrace", "chart_files", "csv_text", "json_document", "markdown", "merged_trace", "page",
]  # fmt: skip
