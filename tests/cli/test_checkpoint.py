"""Checkpoints: whole or refused, by name of the file."""

from __future__ import annotations

import io
import os
import random
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metafast.cli import checkpoint as checkpoints
from metafast.cli.checkpoint import NAME, Checkpoint, Schedule, load, restore, restore_optimizer, save, sealed
from metafast.cli.recipe import Recipe, Tasks
from metafast.cli.trainer import Trainer
from tests.cli.runs import assert_same, metafast, train

CPU = torch.device("cpu")


def trained(steps: int = 2, learner: str = "maml", **given: Any) -> tuple[Trainer, Checkpoint]:
    recipe = Recipe.of(learner, "sinusoid", {"width": 6, "tasks": 3, "steps": 1} | given)
    trainer = Trainer(recipe, Tasks(recipe, test=False, root=None, device=CPU), CPU)
    for _ in range(steps):
        trainer.step()
    return trainer, trainer.checkpoint(Schedule(10, 2, 5))


def fields(checkpoint: Checkpoint) -> dict[str, Any]:
    return dict(vars(checkpoint))


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    _, checkpoint = trained()
    save(tmp_path / NAME, checkpoint)
    assert_same(fields(load(tmp_path / NAME)), fields(checkpoint))
    assert_same(fields(load(tmp_path)), fields(checkpoint))
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_crash_while_saving_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, checkpoint = trained()
    save(tmp_path / NAME, checkpoint)
    trainer.step()

    def full(number: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path / NAME, trainer.checkpoint(Schedule(10, 2, 5)))
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert load(tmp_path).iteration == 2


def flip(content: bytes, at: int, bit: int = 1) -> bytes:
    return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]


def weight_at(content: bytes) -> int:
    """Where the bytes of the first weight matrix are: in the middle of its zip member."""
    _, checkpoint = trained()
    return content.index(checkpoint.learner["model.layers.2.weight"].numpy().tobytes()) + 40


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "a flipped bit of a weight": lambda content: flip(content, weight_at(content)),
    "text": lambda content: b"weights\n" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(damage: str, tmp_path: Path) -> None:
    save(tmp_path / NAME, trained()[1])
    (tmp_path / NAME).write_bytes(DAMAGES[damage]((tmp_path / NAME).read_bytes()))
    with pytest.raises(ValueError, match=f"^{str(tmp_path / NAME)!r}: damaged, or no checkpoint"):
        load(tmp_path)


def version_1(content: bytes) -> bytes:
    """The same as it was written before there was a checksum of the whole."""
    stored = torch.load(io.BytesIO(content), weights_only=True)
    buffer = io.BytesIO()
    torch.save(stored | {"format": "metafast checkpoint, version 1"}, buffer)
    return buffer.getvalue()


def test_any_flipped_bit_and_any_cut_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path / NAME, trained()[1])
    whole, r = (tmp_path / NAME).read_bytes(), random.Random(0)
    damaged = [
        flip(whole, at, 1 << r.randrange(8)) for at in (*range(0, len(whole), 23), *range(len(whole) - 200, len(whole)))
    ]
    damaged += [whole[:length] for length in (*range(0, len(whole), 97), *range(len(whole) - 120, len(whole), 3))]
    for _ in range(30):
        at, length = r.randrange(len(whole)), r.randint(1, 300)
        damaged += [whole[:at] + whole[at + length :], whole[:at] + r.randbytes(length) + whole[at:]]
        damaged += [whole + r.randbytes(length)]
    for content in damaged:
        (tmp_path / NAME).write_bytes(content)
        with pytest.raises(ValueError, match=f"^{re.escape(repr(str(tmp_path / NAME)))}: "):
            load(tmp_path)


def test_the_checksum_does_not_keep_others_from_reading(tmp_path: Path) -> None:
    _, checkpoint = trained()
    save(tmp_path / NAME, checkpoint)
    assert_same(torch.load(tmp_path / NAME, weights_only=True)["learner"], checkpoint.learner)
    with zipfile.ZipFile(tmp_path / NAME) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"metafast sha256 ")


def test_checkpoints_of_version_1_are_read(tmp_path: Path) -> None:
    _, checkpoint = trained()
    save(tmp_path / NAME, checkpoint)
    old, r = version_1((tmp_path / NAME).read_bytes()), random.Random(0)
    (tmp_path / NAME).write_bytes(old)
    assert_same(fields(load(tmp_path)), fields(checkpoint))
    for _ in range(60):
        (tmp_path / NAME).write_bytes(old[: r.randrange(len(old))])
        with pytest.raises(ValueError, match=f"^{re.escape(repr(str(tmp_path / NAME)))}: damaged"):
            load(tmp_path)
    # A new one that has lost its checksum is none.
    (tmp_path / NAME).write_bytes(old.replace(b"checkpoint, version 1", b"checkpoint, version 2"))
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path)
    torch.save(torch.load(io.BytesIO(old), weights_only=True) | {"format": checkpoints.FORMAT}, tmp_path / NAME)
    with pytest.raises(ValueError, match="expected a file that `metafast train` wrote"):
        load(tmp_path)


class Evil:
    """What a pickle could do if it were let."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("pwned"),)


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoints.FORMAT, "iteration": Evil()}, NAME)
    with pytest.raises(ValueError, match="damaged, or no checkpoint"):
        load(Path(NAME))
    assert not Path("pwned").exists()


CONTENTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda c: [1, 2], "expected a file that `metafast train` wrote"),
    "someone's state_dict": (lambda c: c["learner"], "expected a file that `metafast train` wrote"),
    "another version": (lambda c: c | {"format": "metafast checkpoint, version 9"}, "version 2"),
    "no generator": (lambda c: {k: v for k, v in c.items() if k != "generator"}, "generator: expected a Tensor"),
    "negative iteration": (lambda c: c | {"iteration": -1}, "iteration: expected an int of at least 0"),
    "a recipe of ways": (lambda c: c | {"recipe": c["recipe"] | {"ways": 5}}, "--ways: waves have no classes"),
    "half a recipe": (lambda c: c | {"recipe": {"learner": "maml"}}, "expected a recipe with"),
    "another schedule": (lambda c: c | {"schedule": {"iterations": 3}}, "log_every"),
    "no sums": (lambda c: c | {"window": {}}, "window: count: expected a finite number"),
    "weights that are none": (lambda c: c | {"learner": {"model": 3}}, "learner: model: expected a tensor"),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_other_contents(what: str, tmp_path: Path) -> None:
    change, message = CONTENTS[what]
    save(tmp_path / NAME, trained()[1])
    (tmp_path / NAME).write_bytes(sealed(change(torch.load(tmp_path / NAME, weights_only=True))))
    with pytest.raises(ValueError, match=f"^{str(tmp_path / NAME)!r}: ") as caught:
        load(tmp_path)
    assert message in str(caught.value)


def test_weights_of_another_model(tmp_path: Path) -> None:
    _, small = trained()
    _, large = trained(width=7)
    with pytest.raises(
        ValueError, match=r"^'run': holds the weights of another model .*bias of shape \(6,\), got \(7,\)"
    ):
        restore(Path("run"), replace(small, learner=large.learner))
    without = {name: value for name, value in small.learner.items() if "4.bias" not in name}
    with pytest.raises(ValueError, match=r"^'run': holds .* expected model.layers.4.bias of shape \(1,\), got none"):
        restore(Path("run"), replace(small, learner=without))
    bad = small.learner | {"model.layers.4.bias": torch.tensor([float("nan")])}
    with pytest.raises(ValueError, match="^'run': model.layers.4.bias: expected finite values"):
        restore(Path("run"), replace(small, learner=bad))


def test_optimizer_state_of_another_model() -> None:
    trainer, small = trained()
    _, large = trained(width=7)
    _, other = trained(learner="lomaml")
    for strange in (large, other):
        with pytest.raises(ValueError, match="^'run': holds the optimiser state of another model"):
            restore_optimizer(Path("run"), replace(small, optimizer=strange.optimizer), trainer.optimizer)
    with pytest.raises(ValueError, match="^'run': holds no state of the optimiser"):
        restore_optimizer(Path("run"), replace(small, optimizer={}), trainer.optimizer)


def test_a_checkpoint_of_another_device_is_not_trained_on() -> None:
    trainer, checkpoint = trained()
    tasks = Tasks(trainer.recipe, test=False, root=None, device=CPU)
    with pytest.raises(ValueError, match="^--device: 'run' was made on cuda"):
        Trainer.resumed(Path("run"), replace(checkpoint, device="cuda"), tasks, CPU)
    with pytest.raises(ValueError, match="^'run': generator: "):
        Trainer.resumed(Path("run"), replace(checkpoint, generator=torch.zeros(3, dtype=torch.uint8)), tasks, CPU)


@pytest.mark.usefixtures("no_pictures")
def test_on_the_command_line_nothing_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bad file is one line and exit code 2, for resuming and for testing, and stays as it is."""
    assert train("maml sinusoid", tmp_path) == 0
    whole = (tmp_path / NAME).read_bytes()
    with zipfile.ZipFile(tmp_path / NAME) as archive:
        assert archive.testzip() is None
    (tmp_path / NAME).write_bytes(whole[:-200])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for words in (["train", "maml", "--data", "sinusoid", "--out", tmp_path, "--resume"], ["eval", tmp_path]):
        assert metafast(*words) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"metafast: {str(tmp_path / NAME)!r}: damaged") and error.count("\n") == 1
        assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
