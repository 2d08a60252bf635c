"""``metafast check``: every operator and learner against float64 autograd, on this machine."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from metafast import checks
from metafast.backend import current_backend
from metafast.bench import describe_machine, write
from metafast.checks import Finding
from metafast.cli.common import Device, Threads, use_device
from metafast.cli.console import ProgressLine, bad_input, say
from metafast.cli.tables import show

COLUMNS = ("subject", "case", "by", "error\nfloat64", "error\nfloat32", "bar\nfloat32", "verdict")


def check(
    device: Device = "cpu",
    backend: Annotated[
        str | None, typer.Option(help="Force one: torch, cpu, cuda or simt; by default what is in force.")
    ] = None,
    subject: Annotated[
        list[str] | None, typer.Option(help="Only this operator or learner, as the table names it; may be repeated.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes, one inner step.")] = False,
    json: Annotated[Path | None, typer.Option(help="File for all findings and the machine's data.")] = None,
    threads: Threads = None,
) -> None:
    """Compare every operator and learner with float64 autograd and print the errors.

    Values and derivatives are computed on the device in float64, which may differ from plain PyTorch's float64 on
    the CPU by 1e-10, and in float32, which may err at most twice as much as plain float32 PyTorch does, plus 1e-5.
    Each cell is the worst relative error of a case. "by" says what computed: the device's kernels, or torch where
    they do not take a case; a backend that is forced has to take all. Exit code 1 if any bar is missed.
    """
    with bad_input():
        where = use_device(device, threads)
        subjects = subject or []
        found = checks.run(device, backend, quick, subjects)
        if json is not None:
            json.parent.mkdir(parents=True, exist_ok=True)
            json.touch()
    in_force = backend or current_backend()
    chosen = checks.cases(quick, subjects, checks.kernels_of(where, in_force))
    findings: list[Finding] = []
    with ProgressLine("checking", sum(len(case.dtypes) for case in chosen), unit="cases") as progress:
        for some in found:
            findings += some
            progress.advance(1, lambda last=some[-1]: f"{last.subject}, {last.case}")  # type: ignore[misc]
    show(f"metafast check on {device}", COLUMNS, rows(findings), bad=("MISSED",))
    for line in refusals(findings):
        say(line, style="dim")
    missed = [finding for finding in findings if not finding.passed]
    for finding in missed:
        say(explained(finding), style="bold red")
    say(f"{len(findings) - len(missed)} of {len(findings)} errors within their bars", style="bold")
    if json is not None:
        write(document(findings, where, in_force, quick), json)
        say(f"wrote {json}")
    if missed:
        raise typer.Exit(1)


def document(findings: list[Finding], device: torch.device, backend: str, quick: bool) -> dict[str, Any]:
    """All findings as plain JSON values; an error that is not finite is null."""
    return {
        "format": 1,
        "machine": describe_machine(device),
        "settings": {"device": str(device), "backend": backend, "quick": quick},
        "passed": all(finding.passed for finding in findings),
        "findings": [
            asdict(f) | {"error": f.error if math.isfinite(f.error) else None, "passed": f.passed} for f in findings
        ],
    }


def rows(findings: list[Finding]) -> list[tuple[str, ...]]:
    """A row for each subject and case: what computed, the worst error in each dtype, whether all are within bars."""
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
                ", ".join(dict.fromkeys(f.by for f in group if f.by)),
                *(f"{worst[dtype].error:.0e}" if dtype in worst else "" for dtype in ("float64", "float32")),
                f"{single.bar:.0e}" if single else "",
                "ok" if all(f.passed for f in group) else "MISSED",
            )
        )
    return table


def refusals(findings: list[Finding]) -> list[str]:
    """Why torch computed what the kernels did not take, a line for each reason."""
    reasons: dict[str, dict[str, None]] = {}
    for finding in findings:
        if finding.refusal and finding.by:
            reason = finding.refusal.partition("is forced, but ")[2] or finding.refusal
            reasons.setdefault(reason, {})[finding.subject] = None
    return [f"by torch: {', '.join(subjects)}: {reason}" for reason, subjects in reasons.items()]


def explained(finding: Finding) -> str:
    """One line on a finding that missed its bar."""
    what = f"{finding.subject}, {finding.case}, {finding.quantity}, {finding.dtype}: "
    return what + (finding.note or f"relative error {finding.error:.2e}, at most {finding.bar:.2e} allowed")
