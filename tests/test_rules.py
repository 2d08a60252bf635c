"""The update rules of the family: their meta-gradients, theta's and their own, against one autograd graph per task."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import metafast as mf
from tests.nets import build, episodes_for, gradient, relative_error

pytestmark = pytest.mark.usefixtures("backend")
STEPS = 3


def _heavy_ball(rule: mf.Momentum, phi: list[Tensor], grads: list[Tensor], state: list[Tensor] | None, k: int):
    state = [torch.zeros_like(g) for g in grads] if state is None else state
    state = [rule.momentum * v + g for v, g in zip(state, grads)]
    return [p - rule.lr * v for p, v in zip(phi, state)], state


def _meta_sgd(rule: mf.LearnedRates, phi: list[Tensor], grads: list[Tensor], state: None, k: int):
    rates = rule.rates.split([p.numel() for p in phi])
    return [p - r.view_as(p) * g for p, r, g in zip(phi, rates, grads)], state


def _layerwise(rule: mf.LayerRates, phi: list[Tensor], grads: list[Tensor], state: None, k: int):
    return [p - rule.rates[k, i] * g for i, (p, g) in enumerate(zip(phi, grads))], state


RULES: dict[str, tuple[Callable[[nn.Module], mf.UpdateRule], Callable]] = {
    "momentum": (lambda model: mf.Momentum(0.1, 0.7), _heavy_ball),
    "learned rates": (lambda model: mf.LearnedRates(model, 0.1), _meta_sgd),
    "rates of layers and steps": (lambda model: mf.LayerRates(model, STEPS, 0.1), _layerwise),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["conv4", "residual", "partly_frozen"])
def test_meta_gradients(name: str, rule: str) -> None:
    model, episodes = build(name), episodes_for(name)
    make, plain = RULES[rule]
    learned = make(model)
    with torch.no_grad():
        for p in learned.parameters():
            p.mul_(1 + 0.3 * torch.randn_like(p))
    learner = mf.GradientLearner(model, learned, steps=STEPS)
    out = learner(episodes)
    out.loss.backward()
    found = gradient(learner)
    learner.zero_grad()

    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    theta = {n: p for n, p in model.named_parameters() if p.requires_grad}
    losses = []
    for t in range(episodes.tasks):
        phi, state = list(theta.values()), None
        for k in range(STEPS):
            outputs = functional_call(model, dict(zip(theta, phi)), (episodes.support_x[t],))
            loss = nn.functional.cross_entropy(outputs, episodes.support_y[t])
            grads = list(torch.autograd.grad(loss, phi, create_graph=True))
            phi, state = plain(learned, phi, grads, state, k)
        outputs = functional_call(model, dict(zip(theta, phi)), (episodes.query_x[t],))
        losses.append(nn.functional.cross_entropy(outputs, episodes.query_y[t]))
    torch.stack(losses).mean().backward()
    assert relative_error(out.losses, torch.stack(losses)) < 1e-10
    assert relative_error(found, gradient(learner)) < 1e-10


def test_more_steps_than_rates() -> None:
    model, episodes = build("mlp"), episodes_for("mlp")
    learner = mf.GradientLearner(model, mf.LayerRates(model, 2, 0.1), steps=3)
    with pytest.raises(ValueError, match="^steps: this rule has rates for 2 steps"):
        learner(episodes)


@pytest.mark.parametrize(
    ("error", "name", "make"),
    [
        (ValueError, "lr", lambda m: mf.Momentum(-0.1)),
        (ValueError, "momentum", lambda m: mf.Momentum(0.1, -1.0)),
        (ValueError, "lr", lambda m: mf.LearnedRates(m, -1.0)),
        (ValueError, "steps", lambda m: mf.LayerRates(m, 0, 0.1)),
        (ValueError, "model", lambda m: mf.LearnedRates(nn.ReLU(), 0.1)),
    ],
)
def test_arguments(error: type[Exception], name: str, make: Callable[[nn.Module], object]) -> None:
    with pytest.raises(error, match=f"^{name}: expected"):
        make(build("mlp"))
