"""`metafast check`: it passes here, and it fails where an operator or a learner is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import metafast as mf
from metafast import _native, checks, ops
from metafast.backend import Refusal, current_backend
from metafast.checks import Case, Finding
from metafast.checks.compare import full_float32, moved
from metafast.cli import main
from metafast.cli.check import explained, refusals, rows
from tests.backends import kernels_of, native


def findings_of(subject: str, case: str = "") -> list[Finding]:
    return [
        finding
        for each in checks.cases(quick=True)
        if each.subject == subject and case in each.name
        for dtype in each.dtypes
        for finding in checks.examine(each, "cpu", dtype)
    ]


def test_every_operator_and_learner_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--quick"]) == 0
    printed = capsys.readouterr().out
    for subject in (*mf.ops.__all__, "MAML", "FOMAML", "LOMAML", "ANIL", "MetaSGD", "ProtoNets"):
        assert subject in printed
    assert "MISSED" not in printed


def test_what_is_compared() -> None:
    names = {(case.subject, case.name) for case in checks.cases()}
    for net in ("MLP", "Conv4, batch norm", "layer norm", "residual"):
        for learner in ("MAML", "FOMAML", "LOMAML"):
            assert {(learner, f"{net}, 1 step"), (learner, f"{net}, 5 steps")} <= names
        assert {("ProtoNets", f"{net}, {metric}") for metric in ("sqeuclidean", "euclidean", "cosine")} <= names
    quantities = {finding.quantity for finding in findings_of("prototype_loss")}
    assert quantities == {"values", "first derivatives", "second derivatives"}


def test_the_same_every_time() -> None:
    assert findings_of("prototype_logits", "cosine") == findings_of("prototype_logits", "cosine")


def wrong_value(params: Tensor, grads: Tensor, lr: Any) -> Any:
    if isinstance(params, list):
        return [p - 1.0001 * r * g for p, g, r in zip(params, grads, lr)]
    return params - 1.0001 * lr * grads


def wrong_derivative(params: Tensor, grads: Tensor, lr: Any) -> Any:
    if isinstance(params, list):
        return [p - r * g.detach() for p, g, r in zip(params, grads, lr)]
    return params - lr * grads.detach()


def raises(params: Tensor, grads: Tensor, lr: Any) -> Any:
    raise RuntimeError("out of registers")


@pytest.mark.parametrize(
    ("operator", "spoilt"),
    [(wrong_value, {"values"}), (wrong_derivative, {"first derivatives", "second derivatives"}), (raises, {"all"})],
)
def test_a_wrong_operator_is_found(
    operator: Callable[..., Any], spoilt: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "inner_update", operator)
    found = findings_of("inner_update")
    for dtype in ("float64", "float32"):
        assert spoilt <= {f.quantity for f in found if f.dtype == dtype and not f.passed}


def test_a_wrong_operator_is_a_red_row_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, "inner_update", raises)
    monkeypatch.setattr(checks.suite, "learner_cases", lambda quick: [])
    assert main(["check", "--quick"]) == 1
    printed = capsys.readouterr().out
    assert "MISSED" in printed
    assert "RuntimeError: out of registers" in printed


@pytest.mark.parametrize(
    ("learner", "name"),
    [("MAML", "MAML"), ("LOMAML", "LOMAML"), ("ANIL", "MAML"), ("MetaSGD", "GradientLearner")],
)
def test_a_wrong_learner_is_found(learner: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dropped Hessian term: the outcome is right, the meta-gradient is not."""
    whole = getattr(checks.learners, name)
    monkeypatch.setattr(checks.learners, name, lambda *args, **options: whole(*args, **options | {"first_order": True}))
    for finding in findings_of(learner, "MLP"):
        assert finding.passed == (finding.quantity == "outcome")


def test_bars() -> None:
    double, single = findings_of("hvp", "function")
    assert (double.dtype, double.bar) == ("float64", 1e-10)
    assert single.dtype == "float32"
    assert 1e-5 < single.bar < 2e-5


def test_nan_fails_and_nothing_hides_it() -> None:
    good, bad = torch.ones(2), torch.tensor([1.0, math.nan])

    def case(*tensors: Tensor) -> Case:
        return Case("x", "y", (dict,), lambda _: {"values": tensors}, lambda _: {"values": [good] * len(tensors)})

    for tensors in ((bad,), (bad, good), (good, bad)):
        (finding,) = checks.examine(case(*tensors), "cpu", torch.float64)
        assert not finding.passed
    (finding,) = checks.examine(case(good, good), "cpu", torch.float64)
    assert finding.passed


def test_a_yardstick_that_is_lost_lets_nothing_through() -> None:
    """Where plain float32 is off by half, twice that is no bar."""
    case = Case(
        "x",
        "y",
        (lambda: {"x": torch.ones(3, dtype=torch.float64)},),
        lambda inputs: {"values": [inputs["x"] * 1.1]},
        lambda inputs: {"values": [inputs["x"] * (1.0 if inputs["x"].dtype == torch.float64 else 1.5)]},
    )
    (finding,) = checks.examine(case, "cpu", torch.float32)
    assert finding.error == pytest.approx(0.1, rel=1e-5)
    assert not finding.passed


@pytest.mark.parametrize(
    ("found", "error"), [([3.0, 4.0], 0.0), ([3.0, 4.5], 0.1), ([0.0, 0.0], 1.0), ([-3.0, -4.0], 2.0)]
)
def test_relative_error(found: list[float], error: float) -> None:
    assert checks.relative_error(torch.tensor(found), torch.tensor([3.0, 4.0])) == pytest.approx(error)


def test_relative_error_at_its_edges() -> None:
    zero = torch.zeros(2)
    assert checks.relative_error(zero, zero) == 0.0
    assert checks.relative_error(torch.tensor([0.0, 1e-30]), zero) == math.inf
    with pytest.raises(ValueError, match="^found: expected shape"):
        checks.relative_error(torch.zeros(1), zero)


def test_moving_inputs_copies_them() -> None:
    inputs = {"net": torch.nn.Linear(2, 2), "x": torch.ones(2), "y": torch.ones(2, dtype=torch.int64)}
    others = moved(inputs, "cpu", torch.float64)
    assert others["net"].weight.dtype == others["x"].dtype == torch.float64
    assert others["y"].dtype == torch.int64
    with torch.no_grad():
        others["net"].weight.zero_()
    assert bool(inputs["net"].weight.any())


def test_a_row_shows_the_worst_error() -> None:
    group = [
        Finding("op", "case", "values", "float64", 1e-16, 1e-10),
        Finding("op", "case", "first derivatives", "float64", 1e-3, 1e-10),
        Finding("op", "case", "values", "float32", 1e-7, 1e-5),
    ]
    assert rows(group) == [("op", "case", "", "1e-03", "1e-07", "1e-05", "MISSED")]
    assert explained(group[1]) == (
        "op, case, first derivatives, float64: relative error 1.00e-03, at most 1.00e-10 allowed"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "nix"], "--device"),
        (["--device", "cuda:99"], "--device"),
        (["--backend", "nix"], "backend: expected one of"),
        (["--threads", "0"], "--threads"),
        (["--subject", "nix"], "subject: expected one of"),
        pytest.param(
            ["--backend", "simt", "--json", "/dev/null/x"], "/dev/null", marks=kernels_of("simt"), id="no such folder"
        ),
    ],
)
def test_bad_input(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks.suite, "examine", raises)  # before any work
    assert main(["check", *options]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert len(captured.err.splitlines()) == 1


# --- who computed ------------------------------------------------------------------------------------------------


def test_no_gpu_is_one_line_before_any_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(checks.suite, "examine", raises)
    assert main(["check", "--device", "cuda", "--json", str(tmp_path / "never.json")]) == 2
    assert "this PyTorch sees 0 CUDA devices" in capsys.readouterr().err
    assert not (tmp_path / "never.json").exists()


@native
def test_the_kernels_compute_what_they_take_and_torch_the_rest() -> None:
    """And a finding says which, and why not the kernels."""
    by = {(f.subject, f.case): f.by for found in checks.run(quick=True, subjects=["hvp", "MAML"]) for f in found}
    assert by["hvp", "of a function"] == by["hvp", "of a module"] == "torch"
    assert set(by.values()) == {"torch", "cpu"}
    assert {by["hvp", "of a network's loss"], by["MAML", "MLP, 1 step"]} == {"cpu"}
    (found,) = {f.by for some in checks.run(backend="torch", quick=True, subjects=["inner_update"]) for f in some}
    assert found == "torch"


@native
def test_a_refused_case_goes_to_torch_unless_the_backend_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    used = ops.inner_update

    def picky(params: Any, grads: Any, lr: Any) -> Any:
        if current_backend() == "cpu" and params[0].dtype == torch.float64:
            raise Refusal("params: backend 'cpu' is forced, but the moon is full")
        return used(params, grads, lr)

    monkeypatch.setattr(ops, "inner_update", picky)
    found = [f for some in checks.run(quick=True, subjects=["inner_update"]) for f in some]
    assert all(f.passed for f in found)
    assert {f.dtype: f.by for f in found} == {"float64": "torch", "float32": "cpu"}
    assert refusals(found) == ["by torch: inner_update: the moon is full"]
    forced = [f for some in checks.run(backend="cpu", quick=True, subjects=["inner_update"]) for f in some]
    assert {f.dtype: f.passed for f in forced} == {"float64": False, "float32": True}
    assert "the moon is full" in explained(forced[0])
    assert refusals(forced) == []


def test_a_backend_on_the_wrong_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="^(backend: 'cuda' computes on cuda tensors|name: )"):
        checks.run(backend="cuda")
    monkeypatch.setattr(checks.suite, "_device", lambda name: torch.device("cuda"))
    with pytest.raises(ValueError, match="^backend: 'cpu' computes on cpu tensors, the device is 'cuda'$"):
        checks.run(device="cuda", backend="cpu") if not _native.missing("cpu") else pytest.skip("no extension")


@pytest.mark.native
@pytest.mark.skipif(bool(_native.missing("simt")), reason=_native.missing("simt"))
def test_the_emulated_kernels_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very path that a GPU takes, on the emulator, and its JSON; learners on one small network alone."""
    for nets in ("NETS", "SMOOTH_NETS"):
        monkeypatch.setattr(checks.learners, nets, {"MLP": getattr(checks.learners, nets)["MLP"]})
    file = tmp_path / "deep" / "check.json"
    assert main(["check", "--quick", "--backend", "simt", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["settings"] == {"device": "cpu", "backend": "simt", "quick": True}
    assert document["machine"]["torch"] == torch.__version__
    assert document["passed"]
    # hvp of what is no network's loss has no kernels.
    by_torch = {"of a function", "of a module"}
    assert all(f["by"] == ("torch" if f["case"] in by_torch else "simt") for f in document["findings"])
    subjects = {f["subject"] for f in document["findings"]}
    assert subjects == {case.subject for case in checks.cases(kernels="simt")}
    assert subjects >= {"hvp", "momentum_update", "mlp_meta_step", "MAML", "FOMAML", "LOMAML", "ProtoNets"}
    assert all(f["passed"] and f["error"] <= f["bar"] for f in document["findings"])
    printed = capsys.readouterr().out
    assert f"wrote {file}" in printed


def test_the_json_of_a_failure_is_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ops, "inner_update", raises)
    assert main(["check", "--quick", "--subject", "inner_update", "--json", str(tmp_path / "x.json")]) == 1
    document = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert not document["passed"]
    assert document["findings"][0]["error"] is None
    assert "out of registers" in document["findings"][0]["note"]


def test_float32_is_whole_during_a_check() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    assert cudnn.allow_tf32  # PyTorch's own choice
    with full_float32():
        assert not cudnn.allow_tf32
        assert not matmul.allow_tf32
    assert (cudnn.allow_tf32, matmul.allow_tf32) == before
