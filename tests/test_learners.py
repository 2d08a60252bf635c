"""What learners do besides the gradient: batch-norm policy, the loop for what vmap cannot take, frozen theta, modes."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from tests.nets import build, episodes_for, gradient, relative_error


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.4), nn.Tanh(), nn.Linear(9, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.high(x).tanh() if x.sum() > 0 else self.low(x).tanh()


class Counting(nn.Module):
    """Keeps a running mean of its own, in place, as home-made norms do."""

    running: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("running", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.running.mul_(0.9).add_(0.1 * y.detach().mean(0))
        return y.tanh() - self.running.detach() * 0


@pytest.mark.parametrize("make", [WithDropout, DataDependent, Counting])
@pytest.mark.parametrize("kind", ["maml", "lomaml", "protonets"])
def test_what_vmap_cannot_take_runs_by_a_loop_and_says_so_once(make: type[nn.Module], kind: str) -> None:
    torch.manual_seed(0)
    model = make().double()
    # One task, so that loop and reference draw the same dropout masks in the same order.
    episodes = episodes_for("mlp", tasks=1 if make is WithDropout else 3)
    optimizer = mf.LSTMOptimizer(hidden=3).double()
    learner = {
        "maml": lambda: mf.MAML(model, lr=0.1, steps=2),
        "lomaml": lambda: mf.LOMAML(model, optimizer, lr=0.1, steps=2),
        "protonets": lambda: mf.ProtoNets(model),
    }[kind]()
    with pytest.warns(UserWarning, match=f"{make.__name__} runs by a loop over tasks") as caught:
        torch.manual_seed(5)
        out = learner(episodes)
        learner(episodes)
    assert len(caught) == 1
    learner.zero_grad()
    out.loss.backward()
    found = gradient(model)
    model.zero_grad()
    torch.manual_seed(5)
    wanted = {
        "maml": lambda: mf.reference.maml(model, episodes, lr=0.1, steps=2),
        "lomaml": lambda: mf.reference.lomaml(model, optimizer, episodes, lr=0.1, steps=2),
        "protonets": lambda: mf.reference.protonets(model, episodes),
    }[kind]()
    wanted.loss.backward()
    assert relative_error(out.losses, wanted.losses) < 1e-10
    assert relative_error(found, gradient(model)) < 1e-10


def test_inactive_dropout_is_no_obstacle() -> None:
    torch.manual_seed(0)
    model = WithDropout().double().eval()
    maml = mf.MAML(model, lr=0.1, steps=1).eval()
    episodes = episodes_for("mlp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = maml(episodes)
    assert relative_error(out.losses, mf.reference.maml(model, episodes, lr=0.1, steps=1).losses) < 1e-10
    maml.train()
    with pytest.warns(UserWarning, match="loop over tasks"):
        maml(episodes)


def test_a_models_own_error_is_not_taken_for_an_obstacle() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) @ torch.ones(7, 2, dtype=x.dtype)

    with pytest.raises(ValueError, match="Broken"):
        mf.MAML(Broken().double())(episodes_for("mlp"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["maml", "protonets"])
def test_running_statistics_are_neither_read_nor_written(kind: str, training: bool) -> None:
    model, episodes = build("conv4"), episodes_for("conv4", tasks=2)
    model.train(training)
    learner = mf.MAML(model, steps=2, lr=0.1) if kind == "maml" else mf.ProtoNets(model)
    before = {n: b.clone() for n, b in model.named_buffers()}
    first = learner.accumulate_grad(episodes)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert all(m.training == training for m in model.modules())
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.track_running_stats
            norm.running_mean.fill_(1e6)
    assert torch.equal(learner.accumulate_grad(episodes).losses, first.losses)


def test_frozen_initialisation_leaves_only_the_optimizer_to_learn() -> None:
    model, episodes = build("mlp"), episodes_for("mlp")
    lo = mf.LOMAML(model, mf.LSTMOptimizer(hidden=3).double(), steps=2, learn_init=False)
    lo(episodes).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lo.optimizer.parameters())


def test_no_grad_builds_nothing() -> None:
    model, episodes = build("mlp"), episodes_for("mlp")
    for learner in (mf.MAML(model, steps=2), mf.ProtoNets(model)):
        with torch.no_grad():
            out = learner(episodes)
        assert out.loss.grad_fn is None and not out.logits.requires_grad
        assert torch.equal(out.losses, learner(episodes).losses.detach())


def test_adapt_is_the_inner_loop_of_forward() -> None:
    model, episodes = build("batch_norm"), episodes_for("batch_norm")
    maml = mf.MAML(model, lr=0.1, steps=3)
    adapted = maml.adapt(episodes.support_x, episodes.support_y)
    assert torch.equal(adapted(episodes.query_x), maml(episodes).logits)
    assert adapted.parameters["0.weight"].shape == (4, 9, 6)
    unadapted = maml.adapt(episodes.support_x, episodes.support_y, steps=0)
    assert torch.equal(unadapted.parameters["0.weight"][2], model[0].weight)


def test_accuracy_is_the_share_of_right_queries() -> None:
    out = mf.MAML(build("mlp"), steps=1)(episodes_for("mlp"))
    labels = episodes_for("mlp").query_y
    assert out.accuracy is not None
    assert torch.equal(out.accuracy, (out.logits.argmax(-1) == labels).double().mean(1))


def test_a_changed_parameter_between_forward_and_backward_is_noticed() -> None:
    model, episodes = build("mlp"), episodes_for("mlp")
    out = mf.MAML(model, lr=0.1, steps=2)(episodes)
    episodes.support_x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_second_derivatives_of_the_meta_objective_raise() -> None:
    model, episodes = build("mlp"), episodes_for("mlp")
    for learner in (mf.MAML(model, lr=0.1, steps=2), mf.ProtoNets(model)):
        (grad,) = torch.autograd.grad(learner(episodes).loss, model[0].weight, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_slices_moves_and_lengths_of_episodes() -> None:
    episodes = episodes_for("mlp")
    assert len(episodes) == episodes.tasks == 4 and episodes.classes == 3
    assert torch.equal(episodes[1:3].query_x, episodes.query_x[1:3])
    assert episodes[-1].support_y.shape == (1, 9)
    single = episodes.to(dtype=torch.float32)
    assert single.query_x.dtype == torch.float32 and single.query_y.dtype == torch.int64
    with pytest.raises(IndexError, match="^index: expected"):
        episodes[4]


def test_explain_names_every_layer() -> None:
    text = str(mf.explain(mf.MAML(mf.models.Conv4(5, width=8)), (1, 28, 28)))
    assert text.count("Conv2d") == 4 and "8x14x14" in text
    with pytest.raises(ValueError, match="^input_shape: the module does not take"):
        mf.explain(nn.Linear(3, 2), (4,))


def test_maml_learns_sinusoids() -> None:
    """A few hundred meta-steps must halve the error after adaptation: signs and scales are right end to end."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    maml = mf.MAML(mf.models.MLP(1, (20, 20), 1), lr=0.02, steps=2, loss="mse")
    meta = torch.optim.Adam(maml.parameters(), lr=5e-3)
    waves = mf.data.Sinusoid()
    unseen = waves.sample(tasks=200, shots=10, queries=20, generator=torch.Generator().manual_seed(9))
    before = maml(unseen).loss.item()
    for _ in range(300):
        meta.zero_grad()
        maml(waves.sample(tasks=16, shots=10, queries=10, generator=generator)).loss.backward()
        meta.step()
    assert maml(unseen).loss.item() < 0.5 * before


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_transforms_of_a_whole_learner_are_refused_with_the_remedy(transform: str, backend: str) -> None:
    episodes = episodes_for("mlp")
    for learner in (mf.MAML(build("mlp"), lr=0.1, steps=1), mf.ProtoNets(build("mlp"))):

        def loss(params: dict[str, torch.Tensor], learner: nn.Module = learner) -> torch.Tensor:
            return torch.func.functional_call(learner, params, (episodes,)).loss

        params = {name: p.detach() for name, p in learner.named_parameters()}
        if transform == "grad":
            transformed = torch.func.grad(loss)
        else:
            transformed, params = torch.func.vmap(loss), {name: torch.stack([p, p]) for name, p in params.items()}
        with pytest.raises(RuntimeError, match=r"^model: torch\.func.*learner\(episodes\)\.loss\.backward"):
            transformed(params)
