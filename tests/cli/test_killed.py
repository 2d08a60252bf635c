"""Runs killed at any moment go on to the same bits: parameters, optimiser, random numbers, metrics and result."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metafast.cli import checkpoint as checkpoints
from metafast.cli import metrics, plots
from metafast.cli.trainer import Trainer
from tests.cli.runs import SMALL, assert_same, state, train

OFTEN = ("--checkpoint-every", 3)
KINDS = ("maml sinusoid", "lomaml sinusoid", "protonets glyphs")
Point = Callable[[pytest.MonkeyPatch, int], None]

pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(patch: pytest.MonkeyPatch, owner: Any, name: str, count: int, before: Callable[..., None] | None) -> None:
    """Die in a function's ``count``-th call: before it, once ``before`` has done something; after it, where None."""
    real, calls = getattr(owner, name), 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != count:
            return real(*args, **kwargs)
        if before is None:
            real(*args, **kwargs)
        else:
            before(*args, **kwargs)
        return die()

    patch.setattr(owner, name, called)


def half_a_file(number: int) -> None:
    os.ftruncate(number, os.fstat(number).st_size // 2)


def half_a_line(path: Path, line: metrics.Line) -> None:
    with path.open("a") as stream:
        stream.write('{"iteration": ' + str(line["iteration"]))


# Where the n-th time kills: the second checkpoint is of iteration 6, the second line of iteration 8.
POINTS: dict[str, Point] = {
    "in a meta-step": lambda patch, n: at_call(patch, Trainer, "step", 4 * n, lambda trainer: None),
    "with half a checkpoint written": lambda patch, n: at_call(patch, os, "fsync", n, half_a_file),
    # The first is that of the metrics file.
    "with a checkpoint not in its place": lambda patch, n: at_call(patch, os, "replace", n + 1, lambda *_: None),
    "with a checkpoint just in its place": lambda patch, n: at_call(patch, os, "replace", n + 1, None),
    "with half a line of metrics": lambda patch, n: at_call(patch, metrics, "append", n, half_a_line),
}


def killed(kind: str, folder: Path, point: str, n: int, *words: object) -> None:
    """Train in a process that dies there."""
    child = os.fork()
    if child == 0:
        try:
            POINTS[point](pytest.MonkeyPatch(), n)
            train(kind, folder, *OFTEN, *words, iterations=14)
        finally:
            os._exit(1)  # it should have died before
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The states of runs without a break."""
    states = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("curves", "sinusoid", "episode"):
            patch.setattr(plots, name, lambda *_: None)
        for kind in KINDS:
            folder = tmp_path_factory.mktemp("whole")
            assert train(kind, folder, *OFTEN, iterations=14) == 0
            states[kind] = state(folder)
    return states


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_a_point(kind: str, point: str, whole: dict[str, Any], tmp_path: Path) -> None:
    """Twice: once in the first run, once in the one that goes on with it."""
    killed(kind, tmp_path, point, 2)
    assert 3 <= checkpoints.load(tmp_path).iteration <= 6
    killed(kind, tmp_path, point, 1, "--resume")
    assert train(kind, tmp_path, *OFTEN, "--resume", iterations=14) == 0
    assert_same(state(tmp_path), whole[kind])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("point", ["in a meta-step", "with half a checkpoint written"])
def test_killed_before_the_first_checkpoint(point: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed("maml sinusoid", tmp_path, point, 1, "--checkpoint-every", 5)
    assert train("maml sinusoid", tmp_path, "--resume") == 2
    assert "there is no file" in capsys.readouterr().err
    assert train("maml sinusoid", tmp_path, "--overwrite") == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_at_any_time(kind: str, tmp_path: Path) -> None:
    """Processes of their own: Ctrl-C at one moment, kill -9 at another, neither chosen."""
    parts, r = tmp_path / "parts", random.Random(kind)
    stops = [signal.SIGINT, signal.SIGKILL]
    r.shuffle(stops)
    words = ["--eval-tasks", "4", "--log-every", "4", "--checkpoint-every", "3", "--iterations", "1000000"]
    for stop, resume in zip(stops, ([], ["--resume"])):
        before = (parts / checkpoints.NAME).stat().st_mtime_ns if resume else 0
        process = subprocess.Popen(
            [sys.executable, "-m", "metafast", "train", *SMALL[kind], *words, "--out", str(parts), *resume],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        deadline = time.monotonic() + 240
        path = parts / checkpoints.NAME
        while not (path.exists() and path.stat().st_mtime_ns > before):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        time.sleep(0.1 * r.random())
        process.send_signal(stop)
        _, error = process.communicate(timeout=120)
        assert process.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL), error
    end = checkpoints.load(parts).iteration + 7
    usual = ("--checkpoint-every", 3)
    assert train(kind, parts, *usual, "--resume", iterations=end) == 0
    assert train(kind, tmp_path / "whole", *usual, iterations=end) == 0
    assert_same(state(parts), state(tmp_path / "whole"))
