"""``metafast check``: every operator and learner against float64 autograd, on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from metafast import checks
from metafast.checks import Finding
from metafast.cli.common import Device, Threads, use_device
from metafast.cli.console import ProgressLine, bad_input, say
from metafast.cli.tables import show

COLUMNS = ("subject", "case", "error\nfloat64", "error\nfloat32", "bar\nfloat32", "verdict")


def check(
    device: Device = "cpu",
    backend: Annotated[
        str | None, typer.Option(help="Force one: torch, cpu, cuda or simt; by default what is in force.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes, one inner step.")] = False,
    threads: Threads = None,
) -> None:
    """Compare every operator and learner with float64 autograd and print the errors.

    Values and derivatives are computed on the device in float64, which may differ from plain PyTorch's float64 on
    the CPU by 1e-10, and in float32, which may err at most twice as much as plain float32 PyTorch does, plus 1e-5.
    Each cell is the worst relative error of a case. Exit code 1 if any bar is missed.
    """
    with bad_input():
        use_device(device, threads)
        found = checks.run(device, backend, quick)
    total = sum(len(case.dtypes) for case in checks.cases(quick))
    findings: list[Finding] = []
    with ProgressLine("checking", total, unit="cases") as progress:
        for some in found:
            findings += some
            progress.advance(1, lambda last=some[-1]: f"{last.subject}, {last.case}")  # type: ignore[misc]
    show(f"metafast check on {device}", COLUMNS, rows(findings), bad=("MISSED",))
    missed = [finding for finding in findings if not finding.passed]
    for finding in missed:
        say(explained(finding), style="bold red")
    say(f"{len(findings) - len(missed)} of {len(findings)} errors within their bars", style="bold")
    if missed:
        raise typer.Exit(1)


def rows(findings: list[Finding]) -> list[tuple[str, ...]]:
    """A row for each subject and case: the worst of its errors in each dtype, and whether all are within bars."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.subject, finding.case), []).append(finding)
    table = []
    for (subject, case), group in groups.items():
        worst = {f.dtype: f for f in sorted(group, key=lambda f: f.error / f.bar)}
        single = worst.get("float32")
        table.append(
            (
                subject,
                case,
                *(f"{worst[dtype].error:.0e}" if dtype in worst else "" for dtype in ("float64", "float32")),
                f"{single.bar:.0e}" if single else "",
                "ok" if all(f.passed for f in group) else "MISSED",
            )
        )
    return table


def explained(finding: Finding) -> str:
    """One line on a finding that missed its bar."""
    what = f"{finding.subject}, {finding.case}, {finding.quantity}, {finding.dtype}: "
    return what + (finding.note or f"relative error {finding.error:.2e}, at most {finding.bar:.2e} allowed")
