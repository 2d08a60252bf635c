"""Rules and parameters that change under way, hooks, single samples, caches that would be stale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from tests.backends import LEARNER_BACKENDS, learners_on
from tests.nets import both_doors, build, episodes_for, gradient, relative_error

BAR = 1e-10
on_backends = pytest.mark.parametrize("backend", LEARNER_BACKENDS)


def lomaml(**options: object) -> mf.LOMAML:
    torch.manual_seed(0)
    return mf.LOMAML(build("mlp"), mf.LSTMOptimizer(3).double(), lr=0.2, steps=2, **options)


@on_backends
def test_functional_call_gives_the_gradients_of_what_it_was_called_with(backend: str) -> None:
    learner, other, episodes = lomaml(), lomaml(), episodes_for("mlp")
    given = {name: (1.5 * p.detach()).requires_grad_() for name, p in learner.named_parameters()}
    with learners_on(backend, lowered=False):  # parameters that are no Parameters
        loss = torch.func.functional_call(learner, given, (episodes,)).loss
        found = torch.autograd.grad(loss, list(given.values()))
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(given[name])
    mf.reference.lomaml(other.model, other.optimizer, episodes, lr=0.2, steps=2).loss.backward()
    assert relative_error(torch.cat([g.reshape(-1) for g in found]), gradient(other)) <= BAR


def test_a_rule_changed_between_forward_and_backward() -> None:
    episodes, results = episodes_for("mlp"), []
    for change in (False, True):
        learner = lomaml()
        with mf.use_backend("torch"):
            loss = learner(episodes).loss
            weights = learner.optimizer.weights
            before = weights[0]
            if change:
                weights[0] = nn.Parameter(torch.zeros_like(before))
            loss.backward()
        weights[0] = before
        results.append(gradient(learner))
    assert torch.equal(*results)
    learner = lomaml()
    with mf.use_backend("torch"):
        loss = learner(episodes).loss
        learner.rule.lr = 0.7
        with pytest.raises(RuntimeError, match="rule: a number of it"):
            loss.backward()


def test_eval_between_forward_and_backward_changes_nothing() -> None:
    class Noisy(mf.Momentum):
        """Steps otherwise in evaluation, which is not when its forward was."""

        def step(self, params: Tensor, grads: Tensor, state: tuple) -> tuple[Tensor, tuple]:
            return super().step(params, grads if self.training else 3 * grads, state)

    model, episodes, found = build("mlp"), episodes_for("mlp"), []
    for evaluates in (False, True):
        learner = mf.GradientLearner(model, Noisy(0.1), steps=2)
        learner.zero_grad()
        loss = learner(episodes).loss
        if evaluates:
            learner.eval()
        loss.backward()
        assert learner.rule.training != evaluates
        found.append(gradient(model))
    assert torch.equal(*found)


@on_backends
@pytest.mark.parametrize("kind", ["maml", "lomaml", "protonets"])
def test_hooks_of_parameters_are_called_by_both_doors(kind: str, backend: str) -> None:
    model, episodes = build("mlp"), episodes_for("mlp")
    learner: nn.Module = {
        "maml": lambda: mf.MAML(model, lr=0.1, steps=1),
        "lomaml": lambda: mf.LOMAML(model, mf.LSTMOptimizer(2).double(), steps=1),
        "protonets": lambda: mf.ProtoNets(model),
    }[kind]()
    weight, seen = model[0].weight, []
    weight.register_hook(lambda g: 0 * g)
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    with mf.use_backend(backend):
        learner.accumulate_grad(episodes)
    assert weight.grad.count_nonzero() == 0
    assert len(seen) == 1


@on_backends
def test_every_engine_hears_of_another_rule_and_order(backend: str) -> None:
    learner, episodes = mf.MAML(build("mlp"), lr=0.2, steps=2), episodes_for("mlp")
    with mf.use_backend(backend):
        both_doors(learner, episodes)
        for lr, first_order in ((0.2, True), (0.3, True), (0.3, False)):
            if learner.rule.lr != lr:
                learner.rule = mf.SGD(lr)
            learner.first_order = first_order
            out, found = both_doors(learner, episodes)
            wanted = mf.reference.maml(learner.model, episodes, lr=lr, steps=2, first_order=first_order)
            wanted.loss.backward()
            for name in ("loss", "losses", "logits"):
                assert relative_error(getattr(out, name), getattr(wanted, name)) <= BAR, name
            assert out.accuracy is not None and torch.equal(out.accuracy, wanted.accuracy)
            assert relative_error(found, gradient(learner)) <= BAR


@on_backends
@pytest.mark.parametrize("door", ["forward", "accumulate_grad"])
def test_no_task_is_an_error(backend: str, door: str) -> None:
    learner, episodes = mf.MAML(build("mlp"), lr=0.2, steps=2), episodes_for("mlp")
    with mf.use_backend(backend):
        getattr(learner, door)(episodes)
        for t in episodes._tensors():
            t.data = t.data[:0]  # no counter tells
        with pytest.raises((ValueError, RuntimeError)):
            getattr(learner, door)(episodes)


@on_backends
def test_a_single_sample_that_batch_norm_refuses(backend: str) -> None:
    model, e = build("batch_norm"), episodes_for("batch_norm")
    with mf.use_backend(backend), pytest.raises(ValueError, match="support_x: .*more than 1 value per channel"):
        mf.MAML(model, lr=0.1, steps=1, support_batch=1)(e)
    # Support and queries of Prototypical Networks go together: a query alone is not alone.
    one = mf.Episodes(e.support_x, e.support_y, e.query_x[:, :1], e.query_y[:, :1])
    with mf.use_backend(backend):
        out = mf.ProtoNets(model)(one)
    assert relative_error(out.losses, mf.reference.protonets(model, one).losses) <= BAR


def test_hvp_of_a_module_that_changed_and_of_several_dtypes() -> None:
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def product() -> dict[str, Tensor]:
        params = {n: p.detach() for n, p in net.named_parameters()}
        return mf.ops.hvp(net, params, params, x, y, loss="cross_entropy")

    product()
    net[0], net[2] = nn.Linear(3, 7), nn.Linear(7, 2)
    assert product()["0.weight"].shape == (7, 3)
    mixed = {n: p.detach().to(torch.float64 if n == "0.bias" else p.dtype) for n, p in net.named_parameters()}
    with pytest.raises(TypeError, match=r"^params\['0.bias'\]: expected dtype torch.float32"):
        mf.ops.hvp(net, mixed, mixed, x, y, loss="cross_entropy")


def test_an_optimizer_of_another_dtype_is_named() -> None:
    learner = mf.LOMAML(build("mlp"), mf.LSTMOptimizer(2), steps=1)
    with pytest.raises(TypeError, match="^(optimizer|weights)"):
        learner(episodes_for("mlp"))
