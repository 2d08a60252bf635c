"""Meta-gradients of all learners against the plain loops, float64; and the loops against finite differences."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from metafast.checks.compare import flat_gradient
from tests.nets import NETS, build, episodes_for, gradient, relative_error

BAR = 1e-10

pytestmark = pytest.mark.usefixtures("backend")


def agree(learner: nn.Module, module: nn.Module, out: mf.Outcome, wanted: mf.Outcome, others: list[nn.Module]) -> None:
    """Outcome and gradients of a learner against those of the reference; ``others`` have parameters besides."""
    assert relative_error(out.losses, wanted.losses) < BAR
    assert relative_error(out.logits, wanted.logits) < BAR
    for owner in (module, *others):
        owner.zero_grad()
    wanted.loss.backward()
    expected = [gradient(owner) for owner in (module, *others)]
    for owner in (module, *others):
        owner.zero_grad()
    out.loss.backward()
    for owner, grad in zip((module, *others), expected):
        assert relative_error(gradient(owner), grad) < BAR


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", NETS)
def test_maml(name: str, steps: int, first_order: bool) -> None:
    model, episodes = build(name), episodes_for(name)
    maml = mf.MAML(model, lr=0.1, steps=steps, first_order=first_order)
    wanted = mf.reference.maml(model, episodes, lr=0.1, steps=steps, first_order=first_order)
    agree(maml, model, maml(episodes), wanted, [])


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", NETS)
def test_lomaml(name: str, steps: int, first_order: bool) -> None:
    model, episodes = build(name), episodes_for(name, tasks=3)
    optimizer = mf.LSTMOptimizer(hidden=5).double()
    lo = mf.LOMAML(model, optimizer, lr=0.2, steps=steps, first_order=first_order)
    wanted = mf.reference.lomaml(model, optimizer, episodes, lr=0.2, steps=steps, first_order=first_order)
    agree(lo, model, lo(episodes), wanted, [optimizer])


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("name", NETS)
def test_protonets(name: str, metric: str) -> None:
    encoder, episodes = build(name), episodes_for(name)
    proto = mf.ProtoNets(encoder, metric=metric)
    agree(proto, encoder, proto(episodes), mf.reference.protonets(encoder, episodes, metric=metric), [])


@pytest.mark.not_lowered
@pytest.mark.parametrize("name", ["conv4", "residual"])
def test_running_statistics_policy(name: str) -> None:
    model, episodes = build(name), episodes_for(name)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 2.0)
    maml = mf.MAML(model, lr=0.1, steps=3, batch_norm="running")
    wanted = mf.reference.maml(model, episodes, lr=0.1, steps=3, batch_norm="running")
    agree(maml, model, maml(episodes), wanted, [])


@pytest.mark.parametrize("tasks", [1, 7])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_weights_odd_numbers_of_tasks_and_no_steps(tasks: int, steps: int) -> None:
    model, episodes = build("mlp"), episodes_for("mlp", tasks=tasks)
    weights = torch.linspace(-1.0, 2.0, tasks, dtype=torch.float64)
    maml = mf.MAML(model, lr=0.1, steps=steps)
    wanted = mf.reference.maml(model, episodes, lr=0.1, steps=steps, weights=weights)
    agree(maml, model, maml(episodes, weights), wanted, [])


@pytest.mark.not_lowered
def test_mse_and_a_callable_loss() -> None:
    torch.manual_seed(0)
    model = mf.models.MLP(1, (7, 5), 1).double()
    episodes = mf.data.Sinusoid().sample(tasks=3, shots=4, queries=6, dtype=torch.float64)

    def huber(f: Tensor, y: Tensor) -> Tensor:
        return nn.functional.smooth_l1_loss(f, y)

    for loss in ("mse", huber):
        maml = mf.MAML(model, lr=0.02, steps=2, loss=loss)
        agree(maml, model, maml(episodes), mf.reference.maml(model, episodes, lr=0.02, steps=2, loss=loss), [])


def test_any_cotangent_reaches_the_parameters() -> None:
    """Not only out.loss: losses and logits are differentiable too."""
    model, episodes = build("batch_norm"), episodes_for("batch_norm")
    maml = mf.MAML(model, lr=0.1, steps=2)

    def objective(out: mf.Outcome) -> Tensor:
        return (out.losses**2).sum() + (out.logits.tanh() * 0.3).sum()

    objective(mf.reference.maml(model, episodes, lr=0.1, steps=2)).backward()
    wanted = gradient(model)
    model.zero_grad()
    objective(maml(episodes)).backward()
    assert relative_error(gradient(model), wanted) < BAR


def test_adapted_outputs_are_differentiable_too() -> None:
    model, episodes = build("layer_norm"), episodes_for("layer_norm")
    maml = mf.MAML(model, lr=0.1, steps=2)
    adapted = maml.adapt(episodes.support_x, episodes.support_y)
    adapted(episodes.query_x).square().sum().backward()
    found = gradient(model)
    model.zero_grad()
    mf.reference.maml(model, episodes, lr=0.1, steps=2).logits.square().sum().backward()
    assert relative_error(found, gradient(model)) < BAR


@pytest.mark.parametrize("learned", [False, True])
def test_a_task_by_hand_is_the_batched_call(learned: bool) -> None:
    model, episodes = build("batch_norm"), episodes_for("batch_norm", tasks=1)
    learner: mf.GradientLearner = mf.MAML(model, lr=0.1, steps=3)
    if learned:
        learner = mf.LOMAML(model, mf.LSTMOptimizer(hidden=3).double(), lr=0.1, steps=3)
    learner(episodes).loss.backward()
    wanted = gradient(learner)
    learner.zero_grad()
    hand = learner.clone()
    for _ in range(3):
        hand.adapt(nn.functional.cross_entropy(hand(episodes.support_x[0]), episodes.support_y[0]))
    nn.functional.cross_entropy(hand(episodes.query_x[0]), episodes.query_y[0]).backward()
    assert relative_error(gradient(learner), wanted) < BAR


def test_accumulate_grad_adds_what_backward_adds() -> None:
    model, episodes = build("mlp"), episodes_for("mlp")
    maml = mf.MAML(model, lr=0.1, steps=2)
    maml(episodes).loss.backward()
    once = gradient(model)
    out = maml.accumulate_grad(episodes)
    assert not out.loss.requires_grad
    assert relative_error(gradient(model), 2 * once) < BAR


class Momentum(mf.UpdateRule):
    """Heavy ball with a learned rate, a learned first velocity and a step counter among the state."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.log_lr = nn.Parameter(torch.full((parameters,), -2.0, dtype=torch.float64))
        self.start = nn.Parameter(torch.full((parameters,), 0.05, dtype=torch.float64))

    def init(self, params: Tensor) -> tuple[Tensor, ...]:
        return self.start * params, torch.zeros((), dtype=torch.int64)

    def step(self, params: Tensor, grads: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        velocity = 0.7 * state[0] + grads / (1 + state[1])
        return params - self.log_lr.exp() * velocity, (velocity, state[1] + 1)


def test_a_users_own_rule_is_exact() -> None:
    model, episodes = build("layer_norm"), episodes_for("layer_norm")
    count = sum(p.numel() for p in model.parameters())
    rule = Momentum(count)
    learner = mf.GradientLearner(model, rule, steps=4)
    learner(episodes).loss.backward()
    found = gradient(learner)
    learner.zero_grad()
    # The same by hand, one autograd graph through everything.
    total = 0.0
    for t in range(episodes.tasks):
        hand = learner.clone()
        for _ in range(4):
            hand.adapt(nn.functional.cross_entropy(hand(episodes.support_x[t]), episodes.support_y[t]))
        total = total + nn.functional.cross_entropy(hand(episodes.query_x[t]), episodes.query_y[t]) / episodes.tasks
    total.backward()
    assert relative_error(found, gradient(learner)) < BAR


def central_difference(objective: Callable[[], Tensor], parameters: list[Tensor], step: float = 1e-6) -> Tensor:
    """Gradient of a scalar function of the parameters by central differences, one coordinate at a time."""
    result = []
    with torch.no_grad():
        for parameter in parameters:
            flat = parameter.view(-1)
            for i in range(flat.numel()):
                kept = flat[i].item()
                flat[i] = kept + step
                with torch.enable_grad():
                    above = objective().item()
                flat[i] = kept - step
                with torch.enable_grad():
                    below = objective().item()
                flat[i] = kept
                result.append((above - below) / (2 * step))
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.not_emulated
@pytest.mark.parametrize("which", ["maml", "lomaml", "protonets"])
@pytest.mark.parametrize("name", ["layer_norm", "batch_norm", "conv"])
def test_the_reference_against_finite_differences(name: str, which: str) -> None:
    # Smooth activations: a kink crossed by a difference says nothing about the derivative.
    torch.manual_seed(3)
    nets = {
        "layer_norm": nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)),
        "batch_norm": nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)),
        "conv": nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)),
            nn.Conv2d(1, 3, 2),
            nn.BatchNorm2d(3),
            nn.Softplus(),
            nn.Flatten(),
            nn.Linear(6, 3),
        ),
    }
    model = nets[name].double()
    episodes = episodes_for("mlp", tasks=2)
    optimizer = mf.LSTMOptimizer(hidden=2).double()

    def objective() -> Tensor:
        if which == "maml":
            return mf.reference.maml(model, episodes, lr=0.3, steps=2).loss
        if which == "lomaml":
            return mf.reference.lomaml(model, optimizer, episodes, lr=0.3, steps=2).loss
        return mf.reference.protonets(model, episodes).loss

    owners = [model, optimizer] if which == "lomaml" else [model]
    parameters = [p for owner in owners for p in owner.parameters()]
    objective().backward()
    found = flat_gradient(parameters)
    assert relative_error(found, central_difference(objective, [p.detach() for p in parameters])) < 1e-6


def test_first_order_is_another_gradient() -> None:
    """The bar above would not notice a first_order flag that does nothing on both sides."""
    model, episodes = build("mlp"), episodes_for("mlp")
    mf.MAML(model, lr=0.1, steps=2)(episodes).loss.backward()
    exact = gradient(model)
    model.zero_grad()
    mf.MAML(model, lr=0.1, steps=2, first_order=True)(episodes).loss.backward()
    assert relative_error(gradient(model), exact) > 1e-3


def test_copies_and_state_dicts_go_on_alike() -> None:
    model, episodes = build("mlp"), episodes_for("mlp")
    maml = mf.MAML(model, lr=0.1, steps=2)
    other = copy.deepcopy(maml)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(maml.state_dict())
    assert torch.equal(other(episodes).losses, maml(episodes).losses)
    assert other.model is not maml.model
    other(episodes).loss.backward()
    assert maml.model[0].weight.grad is None
