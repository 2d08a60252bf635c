"""The documentation: its Python runs, its formulas cover every layer, its tables are the committed results'."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import metafast as mf
from metafast import bench, data, models, ops, reference, rules
from metafast.engine.lowering import Kind
from metafast.engine.lowering.lowered import LOSSES
from tests.scripts import load_module

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Made by the engine in the place of others, csrc/engine/build.cpp; linear_narrow has linear's formulas.
FUSED = {"batch_norm_relu_pool"}


def run(page: Path) -> dict[str, object]:
    """The page's Python blocks in order, in one namespace; an error names the page and its line."""
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": page.stem}
    for block in _BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block[1], str(page), "exec"), names)
    return names


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS))


@pytest.mark.parametrize("page", [p for p in PAGES if _BLOCK.search(p.read_text(encoding="utf-8"))], ids=name_of)
def test_the_python_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    monkeypatch.chdir(ROOT)
    try:
        names = run(page)
    finally:
        torch.set_rng_state(before)
    if page.stem == "four-functions":
        checked = names["checked"]
        assert isinstance(checked, list)
        assert set(checked) == {kind.name for kind in Kind} | FUSED | set(LOSSES)
        assert len(checked) == len(set(checked))


def test_blocks_of_python_are_found() -> None:
    """A fence that the pattern does not see would not be run."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(_BLOCK.findall(text)) == len(re.findall(r"^\s*(?:```|~~~)\s*\{?\.?py", text, re.MULTILINE)), page
    assert sum(bool(_BLOCK.search(page.read_text(encoding="utf-8"))) for page in PAGES) > 10


def test_a_formula_that_is_wrong_is_caught() -> None:
    names = run(DOCS / "four-functions.md")
    right = names["linear"]

    def wrong(at, tangents, dy, tdy):
        y, d, ty, (tdx, tdw, tdb) = right(at, tangents, dy, tdy)
        return y, d, ty, (tdx - dy @ tangents[1], tdw, tdb)

    with pytest.raises(AssertionError, match="linear"):
        names["check"]("linear", torch.nn.functional.linear, wrong, torch.ones(2, 3), torch.ones(4, 3), torch.ones(4))


PUBLIC = [
    *(f"metafast.{name}" for name in mf.__all__),
    *(f"{module.__name__}.{name}" for module in (ops, data, reference, bench) for name in module.__all__),
    *(
        f"{module.__name__}.{name}"
        for module in (rules, models)
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__
    ),
]


def test_every_public_name_is_in_the_api_pages() -> None:
    entries = re.findall(r"^::: (\S+)$", "\n".join(p.read_text() for p in (DOCS / "api").glob("*.md")), re.MULTILINE)
    assert len(entries) == len(set(entries))
    # A function in a module of its own name: the shorter path would be the module's.
    entries = [re.sub(r"\.(\w+)\.\1$", r".\1", entry) for entry in entries]
    rule_names = {entry.replace(".rules.", ".") for entry in entries if ".rules." in entry}  # exported by both
    modules = {f"metafast.{name}" for name in ("data", "models", "ops", "reference")}
    assert set(PUBLIC) - set(entries) - rule_names - modules - {"metafast.__version__"} == set()


def test_every_doctest_runs() -> None:
    """pytest's options see to it; a package of doctests that are not collected would go unnoticed."""
    options = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"--doctest-modules"' in options and 'testpaths = ["metafast"' in options


def test_tables_are_of_the_committed_results() -> None:
    tables = load_module("docs_tables", DOCS / "tables.py")
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    filled = tables.fill(text)
    assert "<!-- table" in text and "<!-- table" not in filled
    found = json.loads((ROOT / "benchmarks/results/quadratics.json").read_text(encoding="utf-8"))
    for name, result in found["optimizers"].items():
        assert re.search(rf"^\| {name} \|.*\| {result['curve'][-1]:.3f} \|$", filled, re.MULTILINE), name
    mlp = json.loads((ROOT / "benchmarks/results/peers-mlp.json").read_text(encoding="utf-8"))
    timed = [side for side in mlp["workloads"][0]["sides"] if "median_seconds" in side]
    assert len(timed) > 5
    for side in timed:
        assert f"| {side['side']} | {1e3 * side['median_seconds']:.3g} ms" in filled
    for peers in (ROOT / "benchmarks/results").glob("peers-*.json"):
        for table in ("medians", "errors"):
            assert f"<!-- table: {table} {peers.stem} -->" in text
    omniglot = json.loads((ROOT / "benchmarks/results/omniglot.json").read_text(encoding="utf-8"))
    assert omniglot["rows"]
    for row in omniglot["rows"].values():
        wanted = [
            row["metafast"]["accuracy"],
            row["inductive"],
            *([row["reference"]["accuracy"]] if "reference" in row else []),
        ]
        for found in wanted:
            assert f"{100 * found['mean']:.1f} ± {100 * found['interval']:.1f}" in filled
    with pytest.raises(KeyError):
        tables.fill("<!-- table: nothing peers-mlp -->")
    with pytest.raises(FileNotFoundError):
        tables.fill("<!-- table: medians nothing -->")


_NAMED = re.compile(r"`((?:tests|metafast|csrc|benchmarks|examples|recipes)/[\w./-]+)(?:::\w+)?`")


def test_files_that_pages_name_are_there() -> None:
    named = {(page, path) for page in PAGES for path in _NAMED.findall(page.read_text(encoding="utf-8"))}
    assert [(name_of(page), path) for page, path in sorted(named) if not (ROOT / path).exists()] == []
    assert len({path for page, path in named if page.stem == "reliability"}) > 20


def test_targets_of_make_that_pages_name_are_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert {name for pair in named for name in pair if name} <= targets, page


def test_no_page_types_a_time() -> None:
    """Times come from results alone; text says what they are of."""
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            assert not re.search(r"\d (?:ms|us|µs)\b", line), f"{page}: {line}"
