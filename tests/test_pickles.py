"""No pickle is loaded that could run code: what reads files says so at every call."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "metafast"
# Calls that may unpickle, and the argument that forbids it; None: there is no such argument.
READERS = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "torch.jit.load": None,
}
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def unsafe(source: str) -> Iterator[str]:
    """What in a file may load a pickle."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        for name in (module, *names):
            if name.partition(".")[0] in MODULES:
                yield f"import of {name}"
        if module in ("torch", "numpy") and "load" in names:
            yield f"load of {module} under another name"
        if isinstance(node, ast.Call) and (called := ast.unparse(node.func)) in READERS:
            wanted = READERS[called]
            given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            if wanted is None or given.get(wanted[0]) is not wanted[1]:
                yield f"{called} in line {node.lineno}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_loads_a_pickle(path: Path) -> None:
    assert list(unsafe(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=trusted)",
        "np.load(path, allow_pickle=True)",
        "torch.jit.load(path)",
    ],
)
def test_what_loads_one_is_found(source: str) -> None:
    assert list(unsafe(source))
    assert not list(unsafe("torch.load(path, weights_only=True); np.load(path, allow_pickle=False)"))
