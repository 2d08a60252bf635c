"""benchmarks/gpu.md: its tables are the model's, and it claims no measurement that is not there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from metafast.bench.cost import cost_of
from metafast.bench.workloads import WORKLOADS
from tests.scripts import load_module

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "benchmarks" / "gpu.md").read_text()
predict = load_module("predict", ROOT / "benchmarks" / "predict.py")


@pytest.mark.parametrize(("name", "made"), [("general", predict.general_table), ("fused", predict.fused_table)])
def test_the_tables_are_the_models(name: str, made: object) -> None:
    assert callable(made)
    (shown,) = re.findall(rf"<!-- predicted: {name} -->\n(.*?)\n<!-- end -->", PAGE, re.S)
    assert shown == made(), "python benchmarks/predict.py prints the tables of benchmarks/gpu.md"


def test_the_arithmetic_of_the_page() -> None:
    assert cost_of(WORKLOADS["sinusoid-k1"]).flops == 25 * 401_922
    assert cost_of(WORKLOADS["sinusoid-k1"]).launches == 11 + 12 + 11 + 4
    assert predict.barriers(WORKLOADS["sinusoid-k1"]) == 29
    assert predict.fused_flops(WORKLOADS["sinusoid-k1"]) == 471_844
    cycles = 471_844 / 2 * 2 / 32 + 29 * 200
    assert predict.fused_seconds(WORKLOADS["sinusoid-k1"]) == pytest.approx(5 * 2.5e-6 + cycles / 1.98e9)


def test_more_tasks_than_multiprocessors_take_turns() -> None:
    from dataclasses import replace

    few = WORKLOADS["sinusoid-k1"]
    many = replace(few, tasks=133)
    launches = 5 * 2.5e-6
    assert predict.fused_seconds(many) - launches == pytest.approx(2 * (predict.fused_seconds(few) - launches))


def test_no_gpu_time_is_claimed_without_a_gpus_name() -> None:
    """Where a result of a GPU is committed, the pages that deny one are to be written anew."""
    results = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")]
    timed = [r for r in results if "workloads" in r]
    measured = [r for r in timed if r["settings"].get("device", "cpu").startswith("cuda")]
    assert all(r["machine"]["gpu"] for r in measured)
    denied = "No GPU time of metafast has been measured."
    for page in (PAGE, (ROOT / "docs" / "cuda.md").read_text()):
        assert (denied in page) == (not measured)
