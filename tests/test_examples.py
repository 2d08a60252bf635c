"""The scripts of examples/, each in a tiny configuration."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples"


def test_the_loop_and_the_call_train_alike(capsys: pytest.CaptureFixture[str]) -> None:
    curves = []
    for name in ("sine_before.py", "sine_after.py"):
        curves.append(runpy.run_path(str(FOLDER / name))["main"](6, tasks=3, steps=2, dtype=torch.float64))
    before, after = torch.tensor(curves, dtype=torch.float64)
    assert len(before) == 6 and float(((before - after) / before).abs().max()) <= 1e-10
    assert before[0] != before[-1]
    first = capsys.readouterr().out.splitlines()
    assert len(first) == 2 and first[0] == first[1]


def test_every_script_is_named_and_tested() -> None:
    scripts = sorted(path.name for path in FOLDER.glob("*.py"))
    readme, tests = (FOLDER / "README.md").read_text(), Path(__file__).read_text()
    assert scripts and all(f"[{name}]({name})" in readme and f'"{name}"' in tests for name in scripts)
