"""``metafast bench``: the meta-step against plain PyTorch and other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from metafast import _check
from metafast.bench import SUITES, WORKLOADS, plot, problems, run, summary, write
from metafast.bench.report import absent, busy
from metafast.cli.common import Threads, use_device
from metafast.cli.console import bad_input, say, say_error
from metafast.cli.tables import Notice, show

COLUMNS = (
    "side",
    "median\nms",
    "spread",
    "times\nmetafast",
    "times\naccum.",
    "error\nfloat64",
    "error\nfloat32",
    "gradient",
)


def bench(
    suite: Annotated[
        str, typer.Option(help=f"Who takes part: {', '.join(SUITES)}. peers also compiles, which takes minutes.")
    ] = "reference",
    workload: Annotated[
        list[str] | None, typer.Option(help=f"Only these, of {', '.join(WORKLOADS)}; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file and the picture.")] = Path("runs/bench"),
    seconds: Annotated[float, typer.Option(help="Seconds of timing for each workload.")] = 3.0,
    threads: Threads = None,
) -> None:
    """Time the meta-step against the reference loops and the libraries that are installed.

    Every side's meta-gradient is first compared with the float64 reference: in float64 on two of the tasks (exact is
    a relative error below 1e-10), and in float32 on what is then timed. Then the sides are timed in turns in one
    process. Suites: "reference" is small and takes a minute; "engine" has the full sizes; "peers" adds torch.compile
    and JAX to them. Libraries that are not installed are named. Exit code 1 if metafast itself is not exact.
    """
    with bad_input():
        chosen = SUITES[_check.choice("--suite", suite, SUITES)]
        names = [_check.choice("--workload", name, WORKLOADS) for name in workload or chosen.workloads]
        _check.number("--seconds", seconds, minimum=0.0)
        use_device("cpu", threads)
        out.mkdir(parents=True, exist_ok=True)
    notice = Notice()

    def finished(result: dict[str, Any]) -> None:
        notice("")
        _print(result)

    document = run(chosen, [WORKLOADS[name] for name in names], seconds, notice, finished)
    if warning := busy(document):
        say(warning, style="yellow")
    write(document, out / f"{suite}.json")
    plot(document, out / f"{suite}.png")
    say(f"wrote {out / f'{suite}.json'} and {out / f'{suite}.png'}")
    wrong = problems(document)
    for line in wrong:
        say_error(line)
    if wrong:
        raise typer.Exit(1)


def _print(result: dict[str, Any]) -> None:
    show(result["workload"]["title"], COLUMNS, summary(result), bad=("differs", "off"))
    for line in absent(result):
        say(line, style="dim")
    say()
