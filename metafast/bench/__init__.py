"""`metafast bench`: the meta-step against plain PyTorch and other libraries; checked first, then timed, alternating."""

from metafast.bench.machine import describe_machine
from metafast.bench.report import plot, problems, summary, write
from metafast.bench.suites import SUITES, Suite, run
from metafast.bench.timing import Timing, alternate
from metafast.bench.workloads import WORKLOADS, Problem, Workload

__all__ = [
    "SUITES",
    "WORKLOADS",
    "Problem",
    "Suite",
    "Timing",
    "Workload",
    "alternate",
    "describe_machine",
    "plot",
    "problems",
    "run",
    "summary",
    "write",
]
