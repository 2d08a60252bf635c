"""Small runs of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from metafast.cli import main, metrics
from metafast.cli.checkpoint import NAME, load

SMALL = {
    "maml sinusoid": ["maml", "--data", "sinusoid", "--width", "8", "--tasks", "4", "--steps", "2"],
    "lomaml sinusoid": ["lomaml", "--data", "sinusoid", "--width", "4", "--tasks", "3", "--steps", "2"],
    "maml glyphs": ["maml", "--data", "glyphs", "--width", "4", "--tasks", "2", "--queries", "2"],
    "fomaml glyphs": ["fomaml", "--data", "glyphs", "--width", "4", "--tasks", "2", "--queries", "2"],
    "reptile glyphs": ["reptile", "--data", "glyphs", "--width", "4", "--tasks", "2", "--queries", "2"],
    "reptile sinusoid": ["reptile", "--data", "sinusoid", "--width", "8", "--tasks", "4", "--steps", "2"],
    "lomaml glyphs": ["lomaml", "--data", "glyphs", "--width", "2", "--tasks", "2", "--queries", "2"],
    "protonets glyphs": ["protonets", "--data", "glyphs", "--width", "4", "--tasks", "2", "--train-ways", "6"],
}


def metafast(*words: object) -> int:
    """The exit code of a command."""
    return main([str(word) for word in words])


def train(kind: str, folder: Path, *words: object, iterations: int = 3) -> int:
    """Train one of the small runs into a folder."""
    short = ("--iterations", iterations, "--eval-tasks", 4, "--log-every", 4, "--out", folder)
    return metafast("train", *SMALL[kind], *short, *words)


def state(folder: Path) -> dict[str, Any]:
    """All that two runs must share to be the same, but the time they took."""
    checkpoint = load(folder / NAME)
    lines = metrics.read(folder / metrics.NAME)
    for line in lines:
        del line["seconds"]
    return {
        "iteration": checkpoint.iteration,
        "recipe": checkpoint.recipe,
        "learner": checkpoint.learner,
        "optimizer": checkpoint.optimizer,
        "generator": checkpoint.generator,
        "window": checkpoint.window,
        "metrics": lines,
        "result": (folder / "result.json").read_text(),
    }


def assert_same(one: Any, other: Any) -> None:
    """Equal all the way down, tensors to the bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            assert_same(a, b)
    else:
        assert one == other
