"""A training run on disk: everything it takes to go on to the same bits, or to evaluate what was learned.

A checkpoint is a plain ``torch.save`` file of tensors, numbers and strings, read with ``weights_only=True``. That is a
zip file; its comment ends with the SHA-256 of all that is before, without which no checkpoint is read.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import uuid
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metafast import _check
from metafast.cli.recipe import AnyLearner, Recipe, build_learner, option

NAME = "checkpoint.pt"
FORMAT = "metafast checkpoint, version 2"
_UNSEALED = "metafast checkpoint, version 1"  # had no checksum of the whole
_MARK = b"metafast sha256 "
_DIGEST = 64  # hexadecimal digits
WINDOW = ("count", "loss", "accuracy")
_TYPES: Mapping[str, type] = {
    "recipe": dict,
    "schedule": dict,
    "iteration": int,
    "seconds": float,
    "device": str,
    "generator": Tensor,
    "learner": dict,
    "optimizer": dict,
    "window": dict,
}


@dataclass(frozen=True)
class Schedule:
    """How long a run is, and how often it writes its metrics and its checkpoint; in iterations, 1 or more."""

    iterations: int
    log_every: int
    checkpoint_every: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            _check.integer(option(name), value, minimum=1)


@dataclass(frozen=True)
class Checkpoint:
    """A training run after ``iteration`` meta-steps.

    Attributes:
        recipe: what is trained on what.
        schedule: how long, and what is written when.
        iteration: meta-steps done.
        seconds: time they took.
        device: where they ran; the generator's state is of no use on another kind of device.
        generator: its state, a uint8 tensor.
        learner: state_dict of the learner.
        optimizer: state_dict of the optimiser.
        window: what has been summed up since the last line of the metrics file.
    """

    recipe: Recipe
    schedule: Schedule
    iteration: int
    seconds: float
    device: str
    generator: Tensor
    learner: dict[str, Tensor]
    optimizer: dict[str, Any]
    window: dict[str, float]


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write beside ``path`` and rename, so that a crash at any moment leaves a whole checkpoint, the old or the new."""
    content = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    content |= {"format": FORMAT, "recipe": checkpoint.recipe.plain(), "schedule": asdict(checkpoint.schedule)}
    whole = sealed(content)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as stream:
            stream.write(whole)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sealed(content: object) -> bytes:
    """The bytes of a ``torch.save`` file with its checksum."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    archive = buffer.getvalue()
    # A zip file without a comment ends with the comment's length, 0.
    body = archive[:-2] + struct.pack("<H", len(_MARK) + _DIGEST) + _MARK
    return body + hashlib.sha256(body).hexdigest().encode()


def clear_unfinished(path: Path) -> None:
    """Remove what writers of ``path`` that were killed have left beside it."""
    for temporary in path.parent.glob(f".{path.name}.*"):
        temporary.unlink()


def load(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: the file, or the folder of a run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged, or something else.
    """
    if path.is_dir():
        path = path / NAME
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint, or a folder with {NAME}: there is no file {str(path)!r}")
    content, is_sealed = _read(path)
    if not isinstance(content, dict) or content.get("format") != (FORMAT if is_sealed else _UNSEALED):
        raise ValueError(f"{str(path)!r}: expected a file that `metafast train` wrote ({FORMAT})")
    try:
        return _checked(content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def restore(path: Path, checkpoint: Checkpoint, **changes: Any) -> AnyLearner:
    """The learner of a checkpoint, with its weights; ``changes`` are to its recipe.

    Raises:
        ValueError: the weights in the file are not those of the recipe's net.
    """
    learner = build_learner(replace(checkpoint.recipe, **changes))
    wanted = {name: tuple(value.shape) for name, value in learner.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in checkpoint.learner.items()}
    if wanted != found:
        name = next(n for n in sorted({*wanted, *found}) if wanted.get(n) != found.get(n))
        raise ValueError(
            f"{str(path)!r}: holds the weights of another model than its recipe says: expected {name} of shape "
            f"{wanted.get(name, 'none')}, got {found.get(name, 'none')}"
        )
    for name, value in checkpoint.learner.items():
        try:
            _check.finite(name, value)
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {error}") from error
    learner.load_state_dict(checkpoint.learner)
    return learner


def restore_optimizer(path: Path, checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser, made for the checkpoint's learner, its state.

    Raises:
        ValueError: the state in the file is not of such an optimiser.
    """
    state = checkpoint.optimizer.get("state", {})
    shapes = dict(enumerate(p.shape for group in optimizer.param_groups for p in group["params"]))
    strange = [
        f"{name} of parameter {i}"
        for i, entry in state.items()
        for name, value in entry.items()
        if i not in shapes or (isinstance(value, Tensor) and value.dim() and value.shape != shapes[i])
    ]
    if strange:
        raise ValueError(f"{str(path)!r}: holds the optimiser state of another model ({', '.join(strange[:3])})")
    try:
        optimizer.load_state_dict(checkpoint.optimizer)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{str(path)!r}: holds no state of the optimiser: {error}") from error


def _read(path: Path) -> tuple[object, bool]:
    """The content of a ``torch.save`` file, and whether it has a checksum; ValueError where it is damaged."""
    content = path.read_bytes()
    is_sealed = _MARK in content[-_DIGEST - len(_MARK) :]  # the end may be missing
    try:
        if is_sealed and hashlib.sha256(content[:-_DIGEST]).hexdigest().encode() != content[-_DIGEST:]:
            raise zipfile.BadZipFile("it fails its checksum")
        if not is_sealed:
            # PyTorch's reader compares no checksums, so a flipped bit in a weight would go unnoticed.
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"{damaged} fails its checksum")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), is_sealed
    except Exception as error:  # what damage makes of these readers is beyond listing
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{str(path)!r}: damaged, or no checkpoint at all: {reason}") from error


def _checked(content: dict[str, Any]) -> Checkpoint:
    for name, kind in _TYPES.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{name}: expected a {kind.__name__}, got {_check.describe(content.get(name))}")
    _check.integer("iteration", content["iteration"], minimum=0)
    for name in WINDOW:
        _check.number(f"window: {name}", content["window"].get(name))
    for name, value in content["learner"].items():
        _check.tensor(f"learner: {name}", value)
    values = {name: content[name] for name in _TYPES}
    values |= {"recipe": Recipe.from_plain(content["recipe"]), "schedule": Schedule(**content["schedule"])}
    return Checkpoint(**values)
