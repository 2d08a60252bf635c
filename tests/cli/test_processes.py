"""``metafast train`` by two processes: the steps of one, one voice, and nobody waits for who is gone."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import metafast.cli.train
import metafast.cli.trainer
from metafast.cli import checkpoint as checkpoints
from metafast.cli import main, metrics, plots
from metafast.cli.processes import Processes, device_of
from metafast.cli.recipe import Recipe, Tasks, build_learner
from metafast.cli.trainer import Trainer
from tests.cli.runs import SMALL, assert_same, state
from tests.nets import relative_error
from tests.processes import in_two

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/several-processes.md"
BAR = 1e-10
RECIPES = {
    "maml sinusoid": {"tasks": 5, "width": 8},
    "lomaml sinusoid": {"tasks": 5, "width": 4, "steps": 2},
    "maml glyphs": {"tasks": 3, "width": 4, "queries": 2},
    "protonets glyphs": {"tasks": 3, "width": 4, "train_ways": 6},
    "reptile sinusoid": {"tasks": 2, "width": 8, "steps": 3},
}


class Exact(Tasks):
    """In float64."""

    def sample(self, tasks: int, generator: torch.Generator) -> Any:
        return super().sample(tasks, generator).to(dtype=torch.float64)


def trained(kind: str, processes: Processes) -> dict[str, Tensor]:
    """Loss, accuracy and parameters after ten steps in float64."""
    recipe = Recipe.of(*kind.split(), RECIPES[kind])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metafast.cli.trainer, "build_learner", lambda recipe: build_learner(recipe).double())
        here = torch.device("cpu")
        trainer = Trainer(recipe, Exact(recipe, test=False, root=None, device=here), here, processes)
    for _ in range(10):
        trainer.step()
    means = {name: torch.tensor(mean, dtype=torch.float64) for name, mean in trainer.means().items()}
    return {**means, **trainer.learner.state_dict()}


def command(*words: object) -> tuple[int, str, str]:
    """Exit code and what was printed and said as an error."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main([str(word) for word in ("train", *words)])
    return code, out.getvalue(), error.getvalue()


def both(rank: int, folder: Path) -> dict[str, Any]:
    processes = Processes(rank, 2)
    for name in ("curves", "sinusoid", "episode"):
        setattr(plots, name, lambda *_: None)
    found: dict[str, Any] = {kind: trained(kind, processes) for kind in RECIPES}

    waves = (*SMALL["maml sinusoid"], "--tasks", 5, "--log-every", 4, "--checkpoint-every", 4, "--eval-tasks", 4)
    found["whole"] = command(*waves, "--iterations", 11, "--out", folder / "whole")
    step = Trainer.step

    def interrupted(self: Trainer) -> None:
        if self.iteration == 5 and rank == 1:  # of the two only the one that does not write
            os.kill(os.getpid(), signal.SIGTERM)
        step(self)

    Trainer.step = interrupted  # type: ignore[method-assign]
    found["stopped"] = command(*waves, "--iterations", 11, "--out", folder / "parts")
    Trainer.step = step  # type: ignore[method-assign]
    found["resumed"] = command(*waves, "--out", folder / "parts", "--resume")

    found["diverged"] = command(*waves, "--lr", 1e30, "--log-every", 1, "--out", folder / "far")
    found["too few"] = command(*SMALL["maml sinusoid"], "--tasks", 1, "--out", folder / "none")
    found["other seed"] = command(*waves, "--seed", rank, "--out", folder / "none")
    found["other length"] = command(*waves, "--iterations", 9 + rank, "--out", folder / "none")
    there = folder / "whole" if rank == 0 else folder / "nowhere"
    found["no checkpoint"] = command(*waves, "--out", there, "--resume")
    found["not empty"] = command(*waves, "--out", folder / "whole")
    return found


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    first, second = in_two(both, tmp_path, tmp_path)
    for kind in RECIPES:
        assert_same(first[kind], second[kind])
        alone = trained(kind, Processes())
        for name, value in alone.items():
            if value.is_floating_point() and float(value.norm()) > 0:
                assert relative_error(first[kind][name], value) <= BAR, (kind, name)

    # To the same bits where it was stopped, by a signal to either.
    code, out, error = first["whole"]
    assert code == 0 and error == "" and "5 tasks a meta-step in 2 processes" in out
    assert second["whole"] == (0, "", "")
    code, out, error = first["stopped"]
    assert code == 128 + signal.SIGTERM and error == ""
    assert "stopped after meta-step 6 of 11" in out and "torchrun ... -m metafast train maml" in out
    assert second["stopped"] == (code, "", "")
    assert first["resumed"][0] == second["resumed"][0] == 0 and "goes on after meta-step 6" in first["resumed"][1]
    assert_same(state(tmp_path / "whole"), state(tmp_path / "parts"))
    assert [line["iteration"] for line in metrics.read(tmp_path / "whole" / metrics.NAME)] == [4, 8, 11]

    # One voice, and all end.
    for what, code, message in (
        ("diverged", 1, "iteration 1: the loss is NaN or infinite"),
        ("too few", 2, "--tasks: expected at least 2, one a process, got 1"),
        ("not empty", 2, "--out: "),
    ):
        assert first[what][0] == second[what][0] == code, what
        assert message in first[what][2] and first[what][2].count("\n") == 1
        assert second[what][1:] == ("", "")
    for what, message in (
        ("other seed", "metafast: process 1: starts otherwise than process 0"),
        ("other length", "metafast: process 1: starts otherwise than process 0"),
        ("no checkpoint", "metafast: process 1: expected a checkpoint"),
    ):
        assert first[what] == (2, "", "")
        assert second[what][0] == 2 and message in second[what][2]
    assert not (tmp_path / "none").exists() and not (tmp_path / "far" / checkpoints.NAME).exists()


def deserted(rank: int, folder: Path, how: str) -> Any:
    step = Trainer.step

    def leaving(self: Trainer) -> None:
        if self.iteration == 3 and rank == 1:
            if how == "dies":
                os._exit(7)
            while not (folder / "over").exists():
                time.sleep(0.05)
        step(self)

    Trainer.step = leaving  # type: ignore[method-assign]
    said = command(*SMALL["maml sinusoid"], "--checkpoint-every", 2, "--out", folder / "run")
    (folder / "over").touch()
    return said


@pytest.mark.parametrize("how", ["dies", "is silent"])
def test_a_process_that_is_lost_is_missed(how: str, tmp_path: Path) -> None:
    code, _, error = in_two(deserted, tmp_path, tmp_path, how, seconds=5, codes=(0, 7 if how == "dies" else 0))[0]
    assert code == 1
    assert error.startswith("metafast: process 0 of 2: another one failed, or was silent for too long: ")
    assert error.count("\n") == 1
    assert checkpoints.load(tmp_path / "run").iteration == 2


def test_shares() -> None:
    for world in (1, 2, 3, 7):
        for tasks in (world, world + 1, 25):
            shares = [list(range(tasks))[Processes(rank, world).share(tasks)] for rank in range(world)]
            assert [task for share in shares for task in share] == list(range(tasks)) and all(shares)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of("cuda:1", Processes()) == "cuda:1" and device_of("cpu", Processes(1, 2)) == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of("cuda", Processes(7, 8)) == "cuda:3"
    with pytest.raises(ValueError, match="^--device: expected cuda, where each process takes a GPU of its own"):
        device_of("cuda:0", Processes(1, 2))


def torchrun(folder: Path, line: str) -> str:
    """What a command of the page prints, here with the tests' Python and in a folder of its own."""
    program, *words = line.split()
    assert program == "torchrun"
    launch = [sys.executable, "-m", "torch.distributed.run", *words]
    for _ in range(4):
        done = subprocess.run(launch, cwd=folder, capture_output=True, text=True, timeout=300)
        # What gloo's threads do to a script that ends, now and then; `-m metafast` sees to it (metafast/__main__.py).
        if "-m metafast" in line or "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_of_the_page(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
    train, resume, script = [line for line in lines if "--nnodes" not in line]
    out = torchrun(tmp_path, train)
    assert "in 2 processes" in out and out.count("wrote checkpoint.pt") == 1
    assert resume.startswith(train.split(" --iterations")[0])
    with pytest.MonkeyPatch.context() as patch:  # by another number of processes
        patch.chdir(tmp_path)
        code, out, error = command(*resume.split(" train ")[1].split())
    assert code == 0 and "goes on after meta-step 40" in out, error
    (script_text,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    name = script.split()[-1]
    (tmp_path / name).write_text(script_text)
    alone = io.StringIO()
    with contextlib.redirect_stdout(alone):
        exec(compile(script_text, name, "exec"), {"__name__": "__main__"})
    assert float(torchrun(tmp_path, script)) == pytest.approx(float(alone.getvalue()), rel=1e-6)
