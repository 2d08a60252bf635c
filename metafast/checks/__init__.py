"""`metafast check`: every operator and learner against float64 autograd, on the machine at hand."""

from metafast.checks.compare import Case, Finding, examine, relative_error
from metafast.checks.suite import cases, kernels_of, run

__all__ = ["Case", "Finding", "cases", "examine", "kernels_of", "relative_error", "run"]
