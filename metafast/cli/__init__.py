"""The command line: ``metafast train | eval | info | check | bench``; :func:`main` is its entry point."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

NEEDED = ("typer", "rich", "matplotlib")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 for a failure, 2 for bad input, 130 after Ctrl-C.

    Args:
        arguments: the words after ``metafast``; those of the process when None.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        needs = f"metafast: the command line needs {', '.join(missing)}: pip install 'metafast[cli]'"
        print(needs, file=sys.stderr)
        return 2
    from metafast.cli.app import run

    return run(arguments)
