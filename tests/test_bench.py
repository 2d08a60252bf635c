"""`metafast bench`: timing in turns, sides that are checked before they are timed, the report, and `metafast info`."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

from metafast import _native, bench, checks
from metafast.backend import Refusal
from metafast.bench import machine, peers, report, roofline, sides, suites
from metafast.bench.cost import cost_of
from metafast.bench.memory import can_measure, peak_bytes
from metafast.bench.peers_func import compiled, grad_of_vmap, vmap_of_grad
from metafast.bench.sides import Prepared, Side
from metafast.bench.timing import MIN_ROUNDS, WARM_UP_CALLS, alternate, by_events, stopwatch
from metafast.bench.workloads import WORKLOADS, Problem, Workload, build
from metafast.cli import main
from metafast.cli.info import facts

TINY = replace(WORKLOADS["sinusoid-k1"], name="tiny", title="tiny sinusoid", tasks=3, shots=4, queries=4)
TINY_NETS = {
    "maml": TINY,
    "two steps": replace(TINY, steps=2),
    "lomaml": replace(WORKLOADS["lomaml-sinusoid"], tasks=2, shots=3, queries=3, steps=2),
    "conv4": replace(WORKLOADS["conv4-64-k1"], tasks=2, ways=3, queries=2, width=4, image=(1, 16, 16)),
    "omniglot_fc": replace(WORKLOADS["omniglot-fc"], tasks=2, ways=3, queries=2),
    "protonets": replace(WORKLOADS["protonets-conv4-64"], tasks=2, ways=3, shots=2, width=4, image=(1, 16, 16)),
}


class FakeClock:
    """Time passes only when a side takes some."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def side(self, name: str, seconds: float) -> Callable[[], None]:
        def step() -> None:
            self.log.append(name)
            self.now += seconds

        return step


# --- timing ------------------------------------------------------------------------------------------------------


def test_alternate_takes_turns_and_reports_seconds_a_call() -> None:
    clock = FakeClock()
    timings = alternate({"a": clock.side("a", 0.5), "b": clock.side("b", 2.0)}, seconds=40.0, clock=clock)
    assert timings["a"].median == pytest.approx(0.5)
    assert timings["b"].quartiles == pytest.approx((2.0, 2.0))
    assert timings["a"].calls == 1
    rounds = len(timings["a"].rounds)
    assert len(timings["b"].rounds) == rounds >= MIN_ROUNDS
    turns = clock.log[-2 * rounds :]
    # Each side once in every round, and not always in the same order.
    assert all(set(turns[i : i + 2]) == {"a", "b"} for i in range(0, len(turns), 2))
    assert turns[:4] == ["a", "b", "b", "a"]
    assert clock.now == pytest.approx(40.0, abs=5.0)


def test_alternate_calls_short_sides_often_and_warms_up() -> None:
    clock = FakeClock()
    timings = alternate({"short": clock.side("short", 1e-3)}, seconds=1.0, clock=clock)
    assert timings["short"].calls == 20
    assert timings["short"].median == pytest.approx(1e-3)
    # Ten calls lead untimed in each round.
    assert clock.log.count("short") == WARM_UP_CALLS + 30 * len(timings["short"].rounds)
    # One of a side that takes longer than the lead, none of one that takes many times as long.
    clock = FakeClock()
    timings = alternate({"a": clock.side("a", 0.05), "b": clock.side("b", 0.2)}, seconds=4.0, clock=clock)
    rounds = len(timings["a"].rounds)
    assert clock.log[-3 * rounds :].count("a") == 2 * rounds and timings["a"].calls == 1


def test_alternate_runs_a_few_rounds_without_time() -> None:
    clock = FakeClock()
    assert len(alternate({"a": clock.side("a", 9.0)}, seconds=0.0, clock=clock)["a"].rounds) == MIN_ROUNDS


def test_alternate_arguments() -> None:
    with pytest.raises(ValueError, match="^seconds: "):
        alternate({"a": lambda: None}, seconds=-1.0)
    with pytest.raises(ValueError, match="^sides: "):
        alternate({}, seconds=1.0)


class FakeGpu:
    """Works through what the host has started; events have its time, in milliseconds."""

    def __init__(self) -> None:
        self.host = self.free = 0.0
        self.waits = 0

    def __call__(self) -> float:
        return self.host

    def side(self, to_start: float, to_run: float) -> Callable[[], None]:
        def step() -> None:
            self.host += to_start
            self.free = max(self.free, self.host) + to_run

        return step

    def event(self) -> FakeEvent:
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.at = gpu, float("nan")

    def record(self, stream: object) -> None:
        assert stream == "stream"
        self.at = max(self.gpu.free, self.gpu.host)

    def synchronize(self) -> None:
        self.gpu.host = max(self.gpu.host, self.at)
        self.gpu.waits += 1

    def elapsed_time(self, other: FakeEvent) -> float:
        assert other.at <= self.gpu.host, "an event's time is asked for before it is reached"
        return 1e3 * (other.at - self.at)


@pytest.mark.parametrize(("to_start", "to_run"), [(1e-5, 2e-3), (2e-3, 1e-5)], ids=["GPU", "host"])
def test_events_give_the_longer_of_the_gpus_and_the_hosts_time(to_start: float, to_run: float) -> None:
    """A clock on the host alone would see 10 us in the first case."""
    gpu = FakeGpu()
    measure = by_events(gpu.event, lambda: "stream")
    assert measure(gpu.side(to_start, to_run), 100) / 100 == pytest.approx(2e-3, rel=0.02)
    assert gpu.waits == 1  # not after each call
    timings = alternate({"a": gpu.side(to_start, to_run)}, seconds=1.0, clock=gpu, measure=measure)
    assert timings["a"].median == pytest.approx(2e-3, rel=0.06)
    assert timings["a"].calls == 10
    assert gpu.host == pytest.approx(1.0, abs=0.5)


def test_the_device_chooses_the_stopwatch() -> None:
    assert stopwatch(torch.device("cpu"))[0] == "perf_counter"
    assert stopwatch(torch.device("cuda", 1))[0] == "cuda events"


# --- workloads and sides -----------------------------------------------------------------------------------------


def test_a_problem_is_seeded_and_its_copies_are_its_own() -> None:
    before = torch.get_rng_state()
    one, other = build(TINY), build(TINY)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.episodes.query_x, other.episodes.query_x)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters()))
    double = one.copy(torch.float64)
    assert double.parameters()[0].dtype == double.episodes.support_y.dtype == torch.float64
    with torch.no_grad():
        double.parameters()[0].zero_()
    assert bool(one.parameters()[0].any())


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_as_their_titles_say(name: str) -> None:
    workload = WORKLOADS[name]
    assert f"T={workload.tasks}" in workload.title
    if workload.learner != "protonets":
        assert workload.title.endswith(f"K={workload.steps}")
    less = workload.shrunk()
    episodes = build(less).episodes
    assert episodes.tasks == less.tasks <= 2
    if workload.ways:
        assert f"{workload.ways}-way {workload.shots}-shot" in workload.title
        assert episodes.support_x.shape[1:] == (workload.ways, *workload.image)
    if "query images" in workload.title:
        assert f"{workload.ways * workload.queries} query images" in workload.title


def all_sides() -> list[Side]:
    """Those that can run here: metafast's own, and the peers that are installed; compiling takes too long."""
    found = {side.name: side for suite in suites.SUITES.values() for side in suite.sides}
    return [side for side in found.values() if side.installed and side is not peers.COMPILE]


@pytest.mark.parametrize("side", all_sides(), ids=lambda side: side.name)
def test_sides_agree_with_the_reference(side: Side) -> None:
    if "cpu" not in side.devices:
        pytest.skip("for GPUs")
    # The usual recipe loses terms where batch norm's weights adapt: the test below says so.
    usual = side in (peers.FUNC_USUAL, peers.TORCHOPT_VMAP)
    for name, workload in TINY_NETS.items():
        if not side.obstacle(workload) and not (usual and name in ("conv4", "omniglot_fc")):
            problem = build(workload)
            wanted = suites.reference_gradient(problem)
            error = suites.gradient_error(side.prepare(problem.copy(torch.float64)), wanted)
            assert error is not None
            assert error < suites.EXACT


def test_the_compiled_peer_is_the_same_function() -> None:
    """By torch.compile's "eager", which traces as any other but compiles nothing."""
    problem = build(TINY_NETS["two steps"])
    prepared = compiled(problem.copy(torch.float64), compiler="eager")
    assert suites.gradient_error(prepared, suites.reference_gradient(problem)) < suites.EXACT


@pytest.mark.parametrize("net", ["two steps", "conv4", "omniglot_fc"])
def test_the_usual_recipe_is_wrong_with_batch_norm_and_the_other_is_not(net: str) -> None:
    problem = build(TINY_NETS[net])
    wanted = suites.reference_gradient(problem)
    usual, other = (suites.gradient_error(f(problem.copy(torch.float64)), wanted) for f in (grad_of_vmap, vmap_of_grad))
    assert other is not None and other <= suites.EXACT
    assert usual is not None and (usual <= suites.EXACT) == (net == "two steps")


def test_every_suite_has_workloads_that_exist_and_metafast_itself() -> None:
    for suite in suites.SUITES.values():
        assert set(suite.workloads) <= set(WORKLOADS)
        assert {sides.AUTOGRAD, sides.ACCUMULATE, sides.REFERENCE} <= set(suite.sides)
    full = suites.SUITES["peers"].workloads
    assert set(full) == {name for name in WORKLOADS if not name.endswith("-small")}


# --- running -----------------------------------------------------------------------------------------------------


def first_order(problem: Problem) -> Prepared:
    """A side that drops the second-order term."""
    from metafast import reference

    w = problem.workload
    return sides.by_backward(
        problem,
        lambda: (
            reference.maml(problem.model, problem.episodes, lr=w.lr, steps=w.steps, loss=w.loss, first_order=True).loss
        ),
    )


def breaks(problem: Problem) -> Prepared:
    raise RuntimeError("no such kernel\nand a long story")


def result_of(extra: Side, workload: Workload = TINY) -> dict[str, Any]:
    suite = suites.Suite("own", (), (sides.AUTOGRAD, sides.REFERENCE, extra))
    (result,) = bench.run(suite, [workload], seconds=0.0)["workloads"]
    found: dict[str, Any] = {side["side"]: side for side in result["sides"]}[extra.name]
    return found


def test_an_exact_side_is_called_exact_and_timed() -> None:
    found = result_of(sides.ACCUMULATE)
    assert found["status"] == "exact"
    assert found["ours"]
    assert found["error_float64"] < 1e-13
    assert 1e-9 < found["error_float32"] < 1e-5
    assert len(found["round_seconds"]) == MIN_ROUNDS
    assert found["median_seconds"] == statistics.median(found["round_seconds"]) > 0


def test_metafasts_own_sides_say_what_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner on a GPU that has no engine must not pass for one."""
    kernels = "torch" if _native.missing("cpu") else "cpu"
    assert result_of(sides.ACCUMULATE)["by"] == kernels
    assert result_of(sides.TORCH_BACKEND)["by"] == "torch"
    assert "by" not in result_of(Side("cheap", first_order))
    monkeypatch.setattr(suites, "kernels_of", lambda device, backend: "cpu")

    def refuses(problem: Problem) -> Prepared:
        if suites.current_backend() == "cpu":
            raise Refusal("model: backend 'cpu' is forced, but it is Sunday")
        return sides.ACCUMULATE.prepare(problem)

    if kernels == "cpu":
        found = result_of(Side("picky", refuses, ours=True))
        assert found["by"] == "torch: model: backend 'cpu' is forced, but it is Sunday"
        assert report.by_torch({"sides": [found]}) == [f"by torch: picky: {found['by'][7:]}"]


def test_a_first_order_gradient_is_found_to_differ() -> None:
    found = result_of(Side("cheap", first_order))
    assert found["status"] == "differs"
    assert found["error_float64"] > 1e-3


def test_a_gradient_that_is_not_finite_differs() -> None:
    found = result_of(Side("nan", lambda problem: Prepared(lambda: None, lambda: torch.full((1761,), torch.nan))))
    assert (found["status"], found["error_float64"]) == ("differs", None)


def test_a_peer_that_breaks_is_reported_with_its_reason() -> None:
    found = result_of(Side("broken", breaks))
    assert (found["status"], found["reason"]) == ("failed", "RuntimeError: no such kernel")


def test_metafast_itself_may_not_break() -> None:
    with pytest.raises(RuntimeError, match="no such kernel"):
        result_of(Side("metafast", breaks, ours=True))


def test_peers_that_are_missing_or_cannot_do_it_are_named() -> None:
    absent = Side("Nowhere", breaks, package="nowhere-at-all")
    assert result_of(absent)["status"] == "not installed"
    assert absent.version is None
    assert result_of(Side("protos", breaks, ("protonets",)))["status"] == "no maml"
    assert result_of(Side("images", breaks, nets=("conv4",)))["status"] == "not for mlp"


@pytest.mark.parametrize(("prepare", "verdict"), [(first_order, "differs"), (sides.REFERENCE.prepare, "exact")])
def test_what_takes_too_long_is_checked_and_not_timed(prepare: Callable[[Problem], Prepared], verdict: str) -> None:
    found = result_of(Side("slow", prepare, untimed=("mlp",)))
    assert found["status"] == f"{verdict}, not timed"
    assert "median_seconds" not in found
    assert (found["error_float64"] <= suites.EXACT) == (verdict == "exact")


@pytest.mark.skipif(not can_measure(), reason="the system does not tell the peak of a process's memory")
def test_memory_is_that_of_the_step() -> None:
    few, many = (replace(TINY_NETS["protonets"], width=64, tasks=tasks) for tasks in (2, 16))
    least, most = (peak_bytes(w, sides.REFERENCE, threads=1) for w in (few, many))
    # The plain loop keeps the activations of all tasks: 15 images of 64 channels of 16 by 16 pixels, several times.
    assert most - least > 14 * 15 * 64 * 16 * 16 * 4
    assert most < 50 * 16 * 15 * 64 * 16 * 16 * 4


def test_memory_of_a_side_that_breaks() -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
        peak_bytes(TINY, Side("nobody", breaks), threads=1)


def test_memory_is_for_the_cpu() -> None:
    suite = suites.Suite("own", (), (sides.AUTOGRAD,))
    with pytest.raises(ValueError, match="memory: expected the device cpu, got cuda"):
        bench.run(suite, [TINY], 0.0, device=torch.device("cuda"), memory=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("side", all_sides(), ids=lambda side: side.name)
def test_sides_agree_on_a_gpu(side: Side) -> None:
    for workload in TINY_NETS.values():
        if "cuda" in side.devices and not side.obstacle(workload):
            problem = build(workload)
            wanted = suites.reference_gradient(problem)
            prepared = side.prepare(problem.copy(torch.float64, torch.device("cuda")))
            assert suites.gradient_error(prepared, wanted) < suites.EXACT


def test_what_is_for_gpus_takes_no_part_on_a_cpu() -> None:
    suite = suites.Suite("own", (), (sides.AUTOGRAD, sides.GRAPH))
    document = bench.run(suite, [TINY], seconds=0.0)
    assert [side["side"] for side in document["workloads"][0]["sides"]] == ["metafast"]
    assert document["settings"]["device"] == "cpu"
    assert document["settings"]["timer"] == "perf_counter"


# --- roofline --------------------------------------------------------------------------------------------------------


def test_the_roofline_is_measured_and_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = roofline.Sizes(2**16, 64, 2, 1000, 8, 16)
    document = {"roofline": roofline.measure(torch.device("cpu"), 0.0, tiny)}
    ceilings, operators = document["roofline"]["ceilings"], document["roofline"]["operators"]
    assert {"copy_bytes_per_second", "float32_flops_per_second", "launch_seconds"} <= set(ceilings)
    assert all(value > 0 for value in ceilings.values())
    for work in operators:
        bound = max(
            work["bytes"] / ceilings["copy_bytes_per_second"], work["flops"] / ceilings["float32_flops_per_second"]
        )
        assert work["share"] == pytest.approx(bound / work["seconds"])
    assert [row[0] for row in report.operators(document)] == ["inner_update", "prototype_loss", "lstm_update"]
    assert "GB/s" in report.ceilings(document)


def test_a_gpu_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert machine._nvidia_smi("7")["gpu_driver"] is None
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ntest "$1" = --id=GPU-7 && echo "580.65, 1980 MHz, 700.00 W"\n')
    program.chmod(0o755)
    assert machine._nvidia_smi("7") == {
        "gpu_driver": "580.65",
        "gpu_max_clock": "1980 MHz",
        "gpu_power_limit": "700.00 W",
    }
    assert set(machine._nvidia_smi("8").values()) == {None}


# --- reporting ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """A run of two small workloads, with a missing peer, one that breaks and one that differs."""
    missing = Side("Nowhere", breaks, package="nowhere-at-all")
    cheap = Side("cheap", first_order, ("maml",))
    suite = suites.Suite("own", (), (*suites.SUITES["reference"].sides[:3], missing, Side("broken", breaks), cheap))
    torch.set_num_threads(1)
    return bench.run(suite, [TINY, TINY_NETS["protonets"]], seconds=0.0)


def test_the_json_file_is_the_document(document: dict[str, Any], tmp_path: Path) -> None:
    bench.write(document, tmp_path / "deep" / "bench.json")
    assert json.loads((tmp_path / "deep" / "bench.json").read_text()) == json.loads(json.dumps(document))
    assert document["machine"]["cpu"]
    assert document["machine"]["torch"] == torch.__version__
    assert document["machine"]["torch_threads"] == 1
    assert document["settings"]["suite"] == "own"


def test_the_table_has_medians_and_ratios(document: dict[str, Any]) -> None:
    result = copy.deepcopy(document["workloads"][0])
    medians = {"metafast": 0.002, "accumulate_grad": 0.001, "reference loop": 0.05, "cheap": 0.12345}
    for side in report.timed(result):
        side["median_seconds"] = medians[side["side"]]
        side["quartile_seconds"] = [0.9 * medians[side["side"]], 1.15 * medians[side["side"]]]
    rows = {row[0]: row for row in bench.summary(result)}
    assert list(rows) == list(medians)
    assert rows["reference loop"][1:5] == ("50", "25 %", "25.0x", "50.0x")
    assert rows["cheap"][1] == "123"
    assert rows["cheap"][-1] == "differs"
    assert rows["metafast"][-1] == "exact"


def test_who_did_not_run_is_said(document: dict[str, Any]) -> None:
    maml, protonets = document["workloads"]
    assert report.absent(maml) == ["not installed: Nowhere", "failed, RuntimeError: no such kernel: broken"]
    assert f"no {protonets['workload']['learner']}: cheap" in report.absent(protonets)


def test_problems_are_metafasts_own(document: dict[str, Any]) -> None:
    assert bench.problems(document) == []
    spoilt = copy.deepcopy(document)
    side = spoilt["workloads"][0]["sides"][1]
    side |= {"status": "differs", "error_float64": 0.25}
    (line,) = bench.problems(spoilt)
    assert line.startswith("tiny: accumulate_grad differs, relative error 2e-01 in float64")


def test_what_metafast_fails_at_on_a_gpu_is_a_problem(document: dict[str, Any]) -> None:
    spoilt = copy.deepcopy(document)
    spoilt["workloads"][0]["sides"][1] = {
        "side": "accumulate_grad, graph",
        "ours": True,
        "status": "failed",
        "reason": "RuntimeError: a capture waits",
    }
    assert bench.problems(spoilt) == ["tiny: accumulate_grad, graph failed, RuntimeError: a capture waits"]


def test_a_picture_names_the_gpu(document: dict[str, Any]) -> None:
    assert report.computer(document).startswith("1 threads, ")
    on_gpu = copy.deepcopy(document)
    on_gpu["settings"]["device"], on_gpu["machine"]["gpu"] = "cuda:0", "NVIDIA H100"
    assert report.computer(on_gpu) == "NVIDIA H100"


def test_a_busy_machine_is_said(document: dict[str, Any]) -> None:
    loaded = copy.deepcopy(document)
    loaded["machine"] |= {"load_average": 1.0, "logical_cpus": 2}
    assert report.busy(loaded) == ""
    loaded["machine"]["load_average"] = 5.5
    assert "load 5.5 on 2 processors" in report.busy(loaded)
    loaded["machine"]["load_average"] = None
    assert report.busy(loaded) == ""


def test_the_plot_has_a_bar_for_each_side(document: dict[str, Any], tmp_path: Path) -> None:
    bench.plot(document, tmp_path / "bench.png")
    picture = matplotlib.image.imread(tmp_path / "bench.png")[..., :3]
    blue = np.all(np.abs(picture - np.array([0x1F, 0x77, 0xB4]) / 255) < 0.02, axis=-1)
    grey = np.all(np.abs(picture - 0x9A / 255) < 0.02, axis=-1)
    # Down the left ends of the bars: runs of a colour are bars. Two workloads, both doors; reference twice, cheap once.
    column = np.nonzero(blue.any(0))[0][0] + 3
    assert (runs(blue[:, column]), runs(grey[:, column])) == (4, 3)


def runs(line: np.ndarray[Any, Any]) -> int:
    """Those of 8 pixels and more: a bar has 30, the rim of a number on the axis may have the same grey."""
    edges = np.diff(line.astype(int), prepend=0, append=0)
    return int((np.nonzero(edges == -1)[0] - np.nonzero(edges == 1)[0] >= 8).sum())


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--workload", "sinusoid-k1", "--seconds", "0", "--threads", "1", "--out", str(tmp_path / "new")]
    assert main(["bench", *options]) == 0
    printed = capsys.readouterr().out
    for words in (WORKLOADS["sinusoid-k1"].title, "reference loop", "accumulate_grad", "exact", "learn2learn"):
        assert words in printed
    written = json.loads((tmp_path / "new" / "reference.json").read_text())
    assert [r["workload"]["name"] for r in written["workloads"]] == ["sinusoid-k1"]
    assert (tmp_path / "new" / "reference.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_measures_the_roofline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roofline, "SMALL", roofline.Sizes(2**16, 64, 2, 1000, 8, 16))
    options = ["--workload", "sinusoid-k1", "--seconds", "0", "--roofline", "--out", str(tmp_path)]
    assert main(["bench", *options]) == 0
    written = json.loads((tmp_path / "reference.json").read_text())
    assert written["roofline"]["operators"][0]["name"] == "inner_update"
    assert written["workloads"][0]["cost"] == cost_of(WORKLOADS["sinusoid-k1"]).json()
    assert "roofline: copy" in capsys.readouterr().out


def test_a_wrong_metafast_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Side("metafast", first_order, ours=True)
    monkeypatch.setitem(suites.SUITES, "reference", suites.Suite("own", (), (wrong, sides.REFERENCE)))
    assert main(["bench", "--workload", "sinusoid-k1", "--seconds", "0", "--out", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--suite", "nix"], "--suite: expected one of"),
        (["--workload", "nix"], "--workload: expected one of"),
        (["--seconds", "-1"], "--seconds"),
        (["--seconds", "nan"], "--seconds"),
        (["--threads", "0"], "--threads"),
        (["--device", "nix"], "--device: expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device: 'cuda:99' is not there"),
    ],
)
def test_bad_input(options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options, "--out", str(tmp_path / "never")]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not (tmp_path / "never").exists()


def test_an_output_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["bench", "--out", str(tmp_path / "file" / "under")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


# --- info --------------------------------------------------------------------------------------------------------


def test_info_says_what_is_in_force(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("METAFAST_CACHE", str(tmp_path / "cache"))
    told = dict(facts())
    assert told["torch"] == torch.__version__
    assert told["cache"] == f"{tmp_path / 'cache'}, not there yet"
    assert told["METAFAST_CACHE"] == str(tmp_path / "cache")
    assert told["backend"].startswith(("auto", "torch", "cpu"))
    status = checks.suite.current_backend()
    assert told["backend"].startswith(status)


def test_info_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    for name, _ in facts():
        assert name in printed
