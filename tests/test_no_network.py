"""The package asks nothing of a network: no module of it can, and training and testing run where none answers."""

from __future__ import annotations

import ast
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.runs import metafast, train

PACKAGE = Path(__file__).parents[1] / "metafast"
MODULES = {"socket", "socketserver", "ssl", "urllib", "http", "ftplib", "smtplib", "xmlrpc"}
MODULES |= {"aiohttp", "httpx", "requests", "urllib3", "torchvision", "huggingface_hub"}


def reaches(source: str) -> Iterator[str]:
    """What in a file may go to the network."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.partition(".")[0] in MODULES or name.startswith("torch.hub"):
                yield f"import of {name}"
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.hub"):
            yield f"torch.hub in line {node.lineno}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_reaches_for_the_network(path: Path) -> None:
    assert list(reaches(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source", ["import urllib.request", "from http import client", "from torch import hub", "torch.hub.load('a', 'b')"]
)
def test_what_reaches_for_it_is_found(source: str) -> None:
    assert list(reaches(source))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a connection was asked for")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.mark.usefixtures("offline")
def test_a_connection_would_be_seen() -> None:
    with pytest.raises(AssertionError, match="a connection was asked for"):
        urllib.request.urlopen("http://127.0.0.1:1/")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("kind", ["maml sinusoid", "protonets glyphs"])
def test_training_and_testing_ask_for_no_connection(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert train(kind, tmp_path / "run", iterations=2) == 0
    assert metafast("eval", tmp_path / "run", "--tasks", 2) == 0
    assert metafast("info") == 0
