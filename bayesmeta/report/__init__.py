"""What `bayesmeta.evaluate` found: results as arrays, tables, pictures, a page to read and files to keep."""

from bayesmeta.report.report import Report
from bayesmeta.report.results import Bands, Curves, Explanation, LearnerResult, ProbabilityMap, joined

__all__ = ["Bands", "Curves", "Explanation", "LearnerResult", "ProbabilityMap", "Report", "joined"]
