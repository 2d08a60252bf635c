"""Capturing a meta-step: all but CUDA's own part, which a recorder in its place repeats without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import metafast as mf
from metafast.learners.captured import Captured
from tests.nets import build, episodes_for


def again(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Runs a step as CUDA's recorder does, some times before and once for the record, and so for each replay."""
    for _ in range(4):
        step()
    return step


def learner_of(kind: str) -> mf.MAML | mf.LOMAML | mf.ProtoNets:
    torch.manual_seed(0)
    if kind == "protonets":
        return mf.ProtoNets(build("mlp"))
    if kind == "lomaml":
        return mf.LOMAML(build("mlp"), mf.LSTMOptimizer(hidden=3).double(), lr=0.1, steps=2)
    return mf.MAML(build("mlp"), lr=0.1, steps=2)


@pytest.mark.parametrize("kind", ["maml", "lomaml", "protonets"])
@pytest.mark.parametrize("weighted", [False, True])
def test_replays_add_what_accumulate_grad_adds(kind: str, weighted: bool) -> None:
    learner, plain = learner_of(kind), learner_of(kind)
    first = episodes_for("mlp")
    other = replace(first, support_x=first.support_x.flip(0) + 0.1, query_x=2 * first.query_x)
    weights = torch.linspace(0.1, 1, len(first), dtype=torch.float64) if weighted else None
    captured = Captured(learner, first, weights, record=again)
    assert all(p.grad is not None and not p.grad.any() for p in learner.parameters())
    for episodes in (first, other, other):
        found, wanted = captured(episodes), plain.accumulate_grad(episodes, weights)
        assert torch.equal(found.losses, wanted.losses) and torch.equal(found.logits, wanted.logits)
    for p, q in zip(learner.parameters(), plain.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-13, atol=1e-15)
    with torch.no_grad():
        for p, q in zip(learner.parameters(), plain.parameters()):  # an optimiser's step between replays
            p.sub_(0.1 * p.grad)
            q.sub_(0.1 * q.grad)
    assert torch.allclose(captured(first).losses, plain.accumulate_grad(first, weights).losses, rtol=1e-12)


def test_gradients_there_before_stay() -> None:
    learner, episodes = learner_of("maml"), episodes_for("mlp")
    for p in learner.parameters():
        p.grad = torch.full_like(p, 3)
    Captured(learner, episodes, record=again)
    assert all(bool((p.grad == 3).all()) for p in learner.parameters() if p.grad is not None)


def test_what_does_not_fit_is_refused() -> None:
    learner, episodes = learner_of("maml"), episodes_for("mlp")
    with pytest.raises(ValueError, match="episodes: expected them on a GPU to capture, got cpu"):
        learner.capture(episodes)
    with pytest.raises(TypeError, match="episodes: expected metafast.Episodes, got"):
        learner.capture(episodes.support_x)  # type: ignore[arg-type]
    captured = Captured(learner, episodes, record=again)
    with pytest.raises(ValueError, match="episodes: expected those captured, support .* capture anew"):
        captured(episodes[:1])
    with pytest.raises(TypeError, match="dtype"):
        captured(episodes.to(dtype=torch.float32))
    before = [p.grad.clone() for p in learner.parameters() if p.grad is not None]
    for p in learner.parameters():
        p.grad = None
    with pytest.raises(RuntimeError, match=r"zero_grad\(set_to_none=False\)"):
        captured(episodes)
    assert before and all(p.grad is None for p in learner.parameters())


def test_masks_are_refused() -> None:
    e = episodes_for("mlp")
    mask = torch.ones(e.support_y.shape[:2], dtype=torch.bool)
    with pytest.raises(ValueError, match="episodes: expected none with masks to capture"):
        Captured(learner_of("maml"), replace(e, support_mask=mask), record=again)
