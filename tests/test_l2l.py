"""metafast.l2l: the loops of learn2learn's public examples, against plain torch loops, and on learn2learn itself.

Where learn2learn is installed, the same loops run on it too: what is tested is what it does.
"""

from __future__ import annotations

import copy
import importlib.util
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import metafast as mf
import metafast.l2l
from tests.nets import gradient, relative_error

BAR = 1e-10
NO_PEER = "learn2learn is not installed; benchmarks/install_peers.sh installs it"
PEER = pytest.mark.skipif(importlib.util.find_spec("learn2learn") is None, reason=NO_PEER)


@pytest.fixture(params=["metafast.l2l", pytest.param("learn2learn", marks=PEER)])
def l2l(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "metafast.l2l":
        yield metafast.l2l
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, not ours
        yield importlib.import_module("learn2learn")


class Sine(nn.Module):
    """The net of its maml_sine.py; ``spare`` is a layer that no loss uses."""

    def __init__(self, dim: int, spare: bool = False) -> None:
        super().__init__()
        self.hidden1, self.hidden2, self.hidden3 = nn.Linear(1, dim), nn.Linear(dim, dim), nn.Linear(dim, 1)
        if spare:
            self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden3(F.relu(self.hidden2(F.relu(self.hidden1(x)))))


def waves(tasks: int = 3) -> mf.Episodes:
    return mf.data.Sinusoid().sample(tasks, 5, 7, torch.Generator().manual_seed(0)).to(dtype=torch.float64)


def images(tasks: int = 3) -> mf.Episodes:
    """3-way 2-shot, of seeded noise 12 x 12."""
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(3).repeat_interleave(2).repeat(tasks, 1)
    x = torch.randn(2, tasks, 6, 1, 12, 12, dtype=torch.float64, generator=g)
    return mf.Episodes(x[0], labels, x[1], labels)


def conv() -> nn.Sequential:
    torch.manual_seed(2)
    blocks = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * 36, 3)).double()


def plain(
    model: nn.Module, e: mf.Episodes, loss: Any, rates: Any, steps: int, first_order: bool = False, head: str = ""
) -> tuple[Tensor, Tensor]:
    """Losses and gradient by one graph a task; parameters outside of ``head`` and unused ones stay."""
    theta = dict(model.named_parameters())
    rates = dict.fromkeys(theta, rates) if isinstance(rates, float) else rates
    losses = []
    for xs, ys, xq, yq in zip(e.support_x, e.support_y, e.query_x, e.query_y):
        phi = dict(theta)
        for _ in range(steps):
            moving = [n for n in phi if n.startswith(head)]
            value = loss(functional_call(model, phi, (xs,)), ys)
            grads = torch.autograd.grad(value, [phi[n] for n in moving], create_graph=True, allow_unused=True)
            for name, g in zip(moving, grads):
                if g is not None:
                    phi[name] = phi[name] - rates[name] * (g.detach() if first_order else g)
        losses.append(loss(functional_call(model, phi, (xq,)), yq))
    found = torch.stack(losses)
    model.zero_grad()
    found.sum().backward()
    return found.detach(), gradient(model)


@pytest.mark.parametrize("first_order", [False, True])
def test_sine_regression(l2l: Any, first_order: bool) -> None:
    torch.manual_seed(0)
    model, e = Sine(8, spare=True).double(), waves()
    wanted, wanted_gradient = plain(model, e, F.mse_loss, 0.05, 3, first_order)
    maml = l2l.algorithms.MAML(model, lr=0.05, first_order=first_order, allow_unused=True)
    maml.zero_grad()
    losses = []
    for i in range(e.tasks):
        learner = maml.clone()
        for _ in range(3):
            learner.adapt(nn.MSELoss()(learner(e.support_x[i]), e.support_y[i]))
        losses.append(nn.MSELoss()(learner(e.query_x[i]), e.query_y[i]))
    sum(losses).backward()
    assert relative_error(torch.stack(losses), wanted) <= BAR
    assert relative_error(gradient(model), wanted_gradient) <= BAR


def fast_adapt(learner: Any, features: Any, task: tuple[Tensor, ...], steps: int) -> Tensor:
    xs, ys, xq, yq = task
    data = features(torch.cat([xs, xq]))
    for _ in range(steps):
        learner.adapt(F.cross_entropy(learner(data[: len(xs)]), ys))
    return F.cross_entropy(learner(data[len(xs) :]), yq)


@pytest.mark.parametrize("mode", [True, False])
def test_omniglot_loop_with_running_statistics(l2l: Any, mode: bool) -> None:
    model, e = conv().train(mode), images()
    twin = copy.deepcopy(model)
    wanted, wanted_gradient = plain(twin, e, F.cross_entropy, 0.3, 2)
    maml = l2l.algorithms.MAML(model, lr=0.3, first_order=False)
    opt = torch.optim.SGD(maml.parameters(), 0.1)
    opt.zero_grad()
    losses = []
    for task in zip(e.support_x, e.support_y, e.query_x, e.query_y):
        learner = maml.clone()
        xs, ys, xq, yq = task
        for _ in range(2):
            learner.adapt(F.cross_entropy(learner(xs), ys))
        error = F.cross_entropy(learner(xq), yq)
        error.backward()
        losses.append(error.detach())
    assert relative_error(torch.stack(losses), wanted) <= BAR
    assert relative_error(gradient(model), wanted_gradient) <= BAR
    # Clones count in the module's own running statistics, which functional_call does for the twin.
    assert torch.equal(model[1].running_var, twin[1].running_var) and model[1].num_batches_tracked == (9 if mode else 0)
    before = model[0].weight.detach().clone()
    opt.step()
    assert relative_error(before - model[0].weight, 0.1 * wanted_gradient[:36].view(4, 1, 3, 3)) <= BAR


@pytest.mark.parametrize("first_order", [False, True])
def test_meta_sgd(l2l: Any, first_order: bool) -> None:
    torch.manual_seed(0)
    model, e = Sine(6).double(), waves()
    meta = l2l.algorithms.MetaSGD(model, lr=0.05, first_order=first_order)
    with torch.no_grad():
        for rate in meta.lrs:
            rate.add_(0.02 * torch.randn_like(rate))
    rates = dict(zip(dict(model.named_parameters()), meta.lrs))
    wanted, wanted_gradient = plain(model, e, F.mse_loss, rates, 2, first_order)
    wanted_rates = gradient(meta.lrs)
    meta.zero_grad()
    losses = []
    for xs, ys, xq, yq in zip(e.support_x, e.support_y, e.query_x, e.query_y):
        learner = meta.clone()
        for _ in range(2):
            learner.adapt(F.mse_loss(learner(xs), ys))
        losses.append(F.mse_loss(learner(xq), yq))
    sum(losses).backward()
    assert relative_error(torch.stack(losses), wanted) <= BAR
    assert relative_error(gradient(model), wanted_gradient) <= BAR
    assert relative_error(gradient(meta.lrs), wanted_rates) <= BAR


def test_anil_features_and_head(l2l: Any) -> None:
    whole, e = conv().eval(), images()
    wanted, wanted_gradient = plain(whole, e, F.cross_entropy, 0.2, 3, head="5.")
    whole.zero_grad()
    features, head = whole[:5], l2l.algorithms.MAML(whole[5], lr=0.2)
    tasks = list(zip(e.support_x, e.support_y, e.query_x, e.query_y))
    losses = [fast_adapt(head.clone(), features, task, 3) for task in tasks]
    sum(losses).backward()
    assert relative_error(torch.stack(losses), wanted) <= BAR
    assert relative_error(gradient(whole), wanted_gradient) <= BAR


def test_a_module_updated_by_hand(l2l: Any) -> None:
    """clone_module and update_module as in its examples of algorithms written out; an LSTM keeps its weights flat."""
    torch.manual_seed(0)
    model = nn.LSTM(2, 3, num_layers=2).double()
    x = torch.randn(4, 5, 2, dtype=torch.float64)
    theta = dict(model.named_parameters())
    grads = torch.autograd.grad(model(x)[0].square().mean(), list(theta.values()), create_graph=True)
    phi = {n: p - 0.5 * g for (n, p), g in zip(theta.items(), grads)}
    functional_call(model, phi, (x,))[0].sin().sum().backward()
    wanted = gradient(model)
    for how in ("updates", "attributes", "maml_update", "grads"):
        model.zero_grad()
        clone = l2l.clone_module(model)
        parameters = list(clone.parameters())
        grads = torch.autograd.grad(clone(x)[0].square().mean(), parameters, create_graph=True)
        if how == "updates":
            l2l.update_module(clone, updates=[-0.5 * g for g in grads])
        elif how == "maml_update":
            clone = l2l.algorithms.maml_update(clone, 0.5, grads)
        elif how == "grads":
            clone = l2l.algorithms.meta_sgd_update(clone, [torch.full_like(p, 0.5) for p in parameters], grads)
        else:
            for p, g in zip(parameters, grads):
                p.update = -0.5 * g
            l2l.update_module(clone)
        clone(x)[0].sin().sum().backward()
        assert relative_error(gradient(model), wanted) <= BAR


def test_detached_clones(l2l: Any) -> None:
    model = conv()
    for keep in (False, True):
        clone = l2l.clone_module(model)
        l2l.utils.detach_module(clone, keep_requires_grad=keep)
        assert all(p.is_leaf and p.requires_grad == keep for p in clone.parameters())
    clone(images().support_x[0]).sum().backward()
    assert all(p.grad is not None for p in clone.parameters()) and all(p.grad is None for p in model.parameters())


def test_what_is_shared_stays_shared(l2l: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    model[2].weight = model[0].weight
    maml = l2l.algorithms.MAML(model, lr=0.1)
    learner = maml.clone()
    assert learner.module[2].weight is learner.module[0].weight is not model[0].weight
    learner.adapt(learner(torch.ones(3, 2, dtype=torch.float64)).square().sum())
    assert learner.module[2].weight is learner.module[0].weight


def test_shared_parameters_stay_shared_in_meta_sgd_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    model[2].weight = model[0].weight
    learner = metafast.l2l.algorithms.MetaSGD(model, lr=0.1).clone()
    learner.adapt(learner(torch.ones(3, 2, dtype=torch.float64)).square().sum())
    assert learner.module[2].weight is learner.module[0].weight


def test_a_submodule_used_twice_is_one_in_the_clone() -> None:
    part = nn.Linear(2, 2)
    clone = metafast.l2l.clone_module(nn.Sequential(part, nn.ReLU(), part))
    assert clone[0] is clone[2] is not part


def test_attributes_are_the_modules(l2l: Any) -> None:
    maml = l2l.algorithms.MAML(conv(), lr=0.1)
    maml.module.note = "here"
    assert maml.note == "here" and maml.clone().note == "here"
    with pytest.raises(AttributeError, match="nowhere"):
        _ = maml.nowhere
    assert next(iter(maml.state_dict())) == "module.0.weight"


def test_options_pass_on_and_hold_for_one_step() -> None:
    maml = metafast.l2l.algorithms.MAML(Sine(4, spare=True).double(), lr=0.1, allow_nograd=True)
    assert maml.allow_unused and maml.clone(allow_unused=False).allow_unused is False
    assert maml.clone(first_order=True).clone().first_order and not maml.first_order
    maml.hidden1.weight.requires_grad_(False)
    learner = maml.clone()
    before, kept = learner.module.hidden2.weight, learner.module.hidden1.weight
    learner.adapt(learner(waves().support_x[0]).square().mean(), first_order=True)
    assert learner.module.hidden1.weight is kept and learner.module.hidden2.weight is not before
    with pytest.raises(ValueError, match=r"^loss: .* does not use spare.weight, spare.bias; allow_unused=True"):
        learner.adapt(learner(waves().support_x[0]).square().mean(), allow_unused=False)
    with pytest.raises(ValueError, match=r"^model: .*hidden1.weight do not; allow_nograd=True"):
        learner.adapt(learner(waves().support_x[0]).square().mean(), allow_nograd=False)


def test_a_learned_rate() -> None:
    e = waves(1)
    maml = metafast.l2l.algorithms.MAML(Sine(4).double(), nn.Parameter(torch.tensor(0.1, dtype=torch.float64)))
    learner = maml.clone()
    learner.adapt(F.mse_loss(learner(e.support_x[0]), e.support_y[0]))
    F.mse_loss(learner(e.query_x[0]), e.query_y[0]).backward()
    assert "lr" in maml.state_dict() and maml.lr.grad.abs() > 0


@pytest.mark.parametrize("again", [copy.deepcopy, lambda maml: pickle.loads(pickle.dumps(maml))])
def test_copies(again: Any) -> None:
    maml, e = metafast.l2l.algorithms.MAML(Sine(4).double(), lr=0.1), waves(1)
    twin = again(maml)
    assert torch.equal(twin.clone()(e.support_x[0]), maml.clone()(e.support_x[0]))
    assert twin.hidden1 is not maml.hidden1


def test_small_tools(l2l: Any) -> None:
    x = torch.tensor(2.0, requires_grad=True)
    (l2l.magic_box(3 * x) * 5).backward()
    assert x.grad == 15 and l2l.magic_box("no tensor") == "no tensor"
    assert l2l.utils.accuracy(torch.eye(4)[:, :3], torch.tensor([0, 1, 1, 0])) == 0.75
    copies = l2l.clone_named_parameters(dict(zip("a", l2l.clone_parameters([x]))))
    assert copies["a"] == x and copies["a"] is not x


def test_bad_input() -> None:
    l2l, model = metafast.l2l, Sine(4)
    maml = l2l.algorithms.MAML(model, 0.1)
    with pytest.raises(TypeError, match="^model: expected a torch.nn.Module, got 3"):
        l2l.algorithms.MAML(3, 0.1)
    with pytest.raises(TypeError, match="^lr: expected a finite number, got 'fast'"):
        l2l.algorithms.MAML(model, "fast")
    with pytest.raises(ValueError, match=r"^loss: expected a scalar, got a float32 tensor of shape \(2, 1\)"):
        maml.clone().adapt(maml(torch.ones(2, 1)))
    with pytest.raises(ValueError, match="^updates: expected 6, one a parameter of the module, got 1"):
        l2l.update_module(l2l.clone_module(model), [torch.ones(1)])
    with pytest.raises(ValueError, match="^grads: expected 6, one a parameter of the module, got 0"):
        l2l.algorithms.maml_update(maml.clone().module, 0.1, [])
    with pytest.raises(ValueError, match="^lrs: expected a rate for parameter 'hidden1.weight', got None"):
        l2l.algorithms.meta_sgd_update(maml.clone().module, None, list(model.parameters()))
    with pytest.raises(TypeError, match="^module: expected a torch.nn.Module"):
        l2l.clone_module(torch.ones(3))
    with pytest.raises(AttributeError, match="algorithms and utils, not 'vision'; see metafast.data"):
        _ = l2l.vision
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = l2l.nothing
