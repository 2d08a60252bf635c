"""The commands, put together."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from metafast.cli.bench import bench
from metafast.cli.check import check
from metafast.cli.console import BAD_INPUT, INTERRUPTED, say_error
from metafast.cli.evaluate import evaluate
from metafast.cli.info import info
from metafast.cli.train import train

app = typer.Typer(
    name="metafast",
    help="Fast, exact meta-learning: MAML, LOMAML and ProtoNets for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command("train")(train)
app.command("eval")(evaluate)
app.command("info")(info)
app.command("check")(check)
app.command("bench")(bench)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; what is wrong with the options is one red line and code 2."""
    try:
        code = app(None if arguments is None else list(arguments), prog_name="metafast", standalone_mode=False)
    except typer.TyperException as error:
        say_error(error.format_message())
        return BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    return code if isinstance(code, int) else 0
