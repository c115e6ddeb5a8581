from eagle3.runs.report.page import write_report
from eagle3.runs.report.summary import benchmark_table, prepared_table, summary_table

__all__ = ["benchmark_table", "prepared_table", "summary_table", "write_report"]
