"""``metafast train``: what a run leaves, that it goes on to the same bits, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from metafast.cli import checkpoint as checkpoints
from metafast.cli import metrics
from metafast.cli.trainer import Trainer
from tests.cli.runs import SMALL, assert_same, metafast, state, train

PNG = b"\x89PNG\r\n\x1a\n"


def interrupt_at(monkeypatch: pytest.MonkeyPatch, iteration: int, number: int = signal.SIGINT) -> None:
    """A signal in the middle of the meta-step that ends at ``iteration``."""
    step = Trainer.step

    def stepping(self: Trainer) -> None:
        if self.iteration == iteration - 1:
            os.kill(os.getpid(), number)
        step(self)

    monkeypatch.setattr(Trainer, "step", stepping)


@pytest.mark.parametrize("kind", SMALL)
def test_a_run_leaves_its_files(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(kind, tmp_path / "run", iterations=6) == 0
    written = {path.name for path in (tmp_path / "run").iterdir()}
    picture = "sinusoid.png" if "sinusoid" in kind else "episode.png"
    assert written == {"checkpoint.pt", "metrics.jsonl", "result.json", "curves.png", picture}
    for name in ("curves.png", picture):
        assert (tmp_path / "run" / name).read_bytes().startswith(PNG)
    lines = metrics.read(tmp_path / "run" / metrics.NAME)
    assert [line["iteration"] for line in lines] == [4, 6]
    assert all(("accuracy" in line) == ("glyphs" in kind) for line in lines)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["tasks"] == 4
    out = capsys.readouterr().out
    assert "4 tasks" in out and "95 % interval" in out


@pytest.mark.usefixtures("no_pictures")
def test_what_is_logged_is_the_mean_over_the_steps(tmp_path: Path) -> None:
    train("maml glyphs", tmp_path / "mean", "--log-every", 3)
    train("maml glyphs", tmp_path / "each", "--log-every", 1)
    (mean,) = metrics.read(tmp_path / "mean" / metrics.NAME)
    each = metrics.read(tmp_path / "each" / metrics.NAME)
    for name in ("loss", "accuracy"):
        assert mean[name] == pytest.approx(sum(line[name] for line in each) / 3, rel=1e-12)
    assert mean["seconds"] > 0


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "kind", ["maml sinusoid", "lomaml sinusoid", "maml glyphs", "reptile glyphs", "protonets glyphs"]
)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Long enough that recordings of the engine set in at different steps of the two runs.
    assert train(kind, tmp_path / "whole", iterations=22) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 10)
        assert train(kind, tmp_path / "parts", iterations=22) == 130
    out = capsys.readouterr().out
    assert f"stopped after meta-step 10 of 22; to go on:\n  metafast train {kind.replace(' ', ' --data ')}" in out
    assert f"--out {tmp_path / 'parts'} --resume" in out
    assert not (tmp_path / "parts" / "result.json").exists()
    learner, data = kind.split()
    assert metafast("train", learner, "--data", data, "--out", tmp_path / "parts", "--resume", "--eval-tasks", 4) == 0
    assert_same(state(tmp_path / "whole"), state(tmp_path / "parts"))


@pytest.mark.usefixtures("no_pictures")
def test_a_crashed_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, often = "maml sinusoid", ("--checkpoint-every", 5)
    assert train(kind, tmp_path / "whole", *often, iterations=14) == 0

    def crash(self: Trainer) -> None:
        if self.iteration == 13:
            raise OSError("the power went")
        step(self)

    step = Trainer.step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", crash)
        with pytest.raises(OSError, match="power"):
            train(kind, tmp_path / "parts", *often, iterations=14)
    with (tmp_path / "parts" / metrics.NAME).open("a") as stream:
        stream.write('{"iteration": 13, "lo')
    assert checkpoints.load(tmp_path / "parts").iteration == 10
    assert train(kind, tmp_path / "parts", "--resume", iterations=14) == 0
    assert_same(state(tmp_path / "whole"), state(tmp_path / "parts"))


@pytest.mark.usefixtures("no_pictures")
def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    kind = "maml sinusoid"
    assert train(kind, tmp_path / "whole", iterations=12) == 0
    assert train(kind, tmp_path / "parts", iterations=8) == 0
    assert train(kind, tmp_path / "parts", "--resume", iterations=12) == 0
    assert_same(state(tmp_path / "whole"), state(tmp_path / "parts"))


@pytest.mark.usefixtures("no_pictures")
def test_the_seed_decides(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train("maml sinusoid", tmp_path / name, "--seed", seed) == 0
    assert_same(state(tmp_path / "a"), state(tmp_path / "b"))
    weights = [checkpoints.load(tmp_path / name).learner["model.layers.0.weight"] for name in "ac"]
    assert not torch.equal(*weights)


def test_sigterm_stops_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, 2, signal.SIGTERM)
    assert train("maml sinusoid", tmp_path) == 128 + signal.SIGTERM
    assert checkpoints.load(tmp_path).iteration == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_diverges_says_so_and_keeps_its_last_good_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("maml sinusoid", tmp_path, "--checkpoint-every", 2, iterations=2) == 0
    # Twice through: the loss overflows only once the weights are large.
    assert train("maml sinusoid", tmp_path / "new", "--lr", 1e30, "--log-every", 1) == 1
    error = capsys.readouterr().err
    assert "metafast: iteration 1: the loss is NaN or infinite; try a smaller --lr or --meta-lr" in error
    assert not (tmp_path / "new" / checkpoints.NAME).exists()


REFUSED = {
    "no classes": (["protonets", "--data", "sinusoid"], "--data: protonets classifies"),
    "ways of waves": (["maml", "--data", "sinusoid", "--ways", "5"], "--ways: waves have no classes"),
    "batch norm of waves": (["maml", "--data", "sinusoid", "--batch-norm", "batch"], "--batch-norm: the net"),
    "steps of protonets": (["protonets", "--data", "glyphs", "--steps", "5"], "--steps: ProtoNets has no inner loop"),
    "order of reptile": (
        ["reptile", "--data", "glyphs", "--first-order"],
        "--first-order: Reptile takes",
    ),
    "order of protonets": (["protonets", "--data", "glyphs", "--first-order"], "--first-order: ProtoNets has no"),
    "train ways of maml": (["maml", "--data", "glyphs", "--train-ways", "9"], "--train-ways: only ProtoNets"),
    "rule lr of maml": (["maml", "--data", "sinusoid", "--rule-lr", "1"], "--rule-lr: only LOMAML learns"),
    "one way": (["maml", "--data", "glyphs", "--ways", "1"], "--ways: expected an int of at least 2, got 1"),
    "no shots": (["maml", "--data", "sinusoid", "--shots", "0"], "--shots: expected an int of at least 1, got 0"),
    "negative steps": (["maml", "--data", "sinusoid", "--steps", "-1"], "--steps: expected an int of at least 0"),
    "negative lr": (["maml", "--data", "sinusoid", "--lr", "-0.1"], "--lr: expected a finite number of at least 0"),
    "infinite meta-lr": (["maml", "--data", "sinusoid", "--meta-lr", "inf"], "--meta-lr: expected a finite number"),
    "no iterations": (["maml", "--data", "sinusoid", "--iterations", "0"], "--iterations: expected an int"),
    "one test task": (["maml", "--data", "sinusoid", "--eval-tasks", "1"], "--eval-tasks: expected an int"),
    "too many ways": (["protonets", "--data", "glyphs", "--ways", "500"], "ways: expected at most"),
    "too many shots": (["maml", "--data", "glyphs", "--shots", "24"], "shots + queries: expected at most 24"),
    "unknown learner": (["mamal", "--data", "glyphs"], "'mamal'"),
    "unknown data": (["maml", "--data", "cifar"], "'cifar'"),
    "unknown option": (["maml", "--data", "glyphs", "--wayz", "5"], "--wayz"),
    "no number": (["maml", "--data", "glyphs", "--ways", "five"], "--ways"),
    "no data": (["maml"], "--data"),
    "unknown device": (["maml", "--data", "sinusoid", "--device", "tpu"], "--device: expected cpu, cuda or cuda:N"),
    "no threads": (["maml", "--data", "sinusoid", "--threads", "0"], "--threads: expected an int"),
    "both": (["maml", "--data", "sinusoid", "--resume", "--overwrite"], "--overwrite: expected either"),
    "nothing to resume": (["maml", "--data", "sinusoid", "--resume"], "there is no file"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_options_are_one_line_and_leave_nothing(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = REFUSED[what]
    assert metafast("train", *words, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("metafast: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("METAFAST_DATA", raising=False)
    assert metafast("train", "maml", "--data", "omniglot", "--out", tmp_path / "run") == 2
    assert "--data-root: expected the folder of Omniglot's files" in capsys.readouterr().err
    monkeypatch.setenv("METAFAST_DATA", str(tmp_path))
    assert metafast("train", "maml", "--data", "miniimagenet", "--out", tmp_path / "run") == 2
    assert repr(str(tmp_path)) in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_a_run_is_not_written_over_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("maml sinusoid", tmp_path, "--seed", 1) == 0
    before = state(tmp_path)
    assert train("maml sinusoid", tmp_path, "--seed", 2) == 2
    assert "--out: " in capsys.readouterr().err
    assert_same(before, state(tmp_path))
    assert train("maml sinusoid", tmp_path, "--seed", 2, "--overwrite") == 0
    assert checkpoints.load(tmp_path).recipe.seed == 2
    (tmp_path / "file").write_text("")
    assert train("maml sinusoid", tmp_path / "file") == 2
    assert "--out: expected a folder" in capsys.readouterr().err


OTHERS = {
    "learner": (["lomaml", "--data", "sinusoid"], "LEARNER: the run in"),
    "data": (["maml", "--data", "glyphs"], "--data: the run in"),
    "width": (["maml", "--data", "sinusoid", "--width", "9"], "--width: the run in"),
    "lr": (["maml", "--data", "sinusoid", "--lr", "0.02"], "has 0.01, got 0.02"),
    "first order": (["maml", "--data", "sinusoid", "--first-order"], "--first-order: the run in"),
    "fewer iterations": (["maml", "--data", "sinusoid", "--iterations", "2"], "--iterations: the run has done 3"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    folder = tmp_path_factory.mktemp("finished")
    assert train("maml sinusoid", folder) == 0
    return folder


@pytest.mark.parametrize("what", OTHERS)
def test_a_run_of_another_recipe_is_not_resumed(what: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    words, message = OTHERS[what]
    assert metafast("train", *words, "--out", finished, "--resume") == 2
    assert message in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in finished.iterdir()}


def test_a_process_and_ctrl_c(tmp_path: Path) -> None:
    words = ["--iterations", "1000000", "--checkpoint-every", "5", "--out", str(tmp_path / "run"), "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "metafast", "train", *SMALL["maml sinusoid"], *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / checkpoints.NAME).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "--resume" in out and "Traceback" not in error
    assert checkpoints.load(tmp_path / "run").iteration >= 5
