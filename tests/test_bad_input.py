"""Bad input: an error that names the argument, before any work, with parameters and gradients untouched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import metafast as mf
from tests.nets import build, episodes_for

LEARNERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "maml": lambda model: mf.MAML(model, lr=0.1, steps=2),
    "lomaml": lambda model: mf.LOMAML(model, mf.LSTMOptimizer(hidden=2).to(torch.float64), steps=2),
    "protonets": lambda model: mf.ProtoNets(model),
}


def parts(tasks: int = 4) -> dict[str, torch.Tensor]:
    episodes = episodes_for("mlp", tasks=tasks)
    return {name: getattr(episodes, name).clone() for name in ("support_x", "support_y", "query_x", "query_y")}


def nan_at(t: torch.Tensor, value: float) -> torch.Tensor:
    t = t.clone()
    t.view(-1)[3] = value
    return t


EPISODES = {
    "mismatched T": (
        ValueError,
        "query_x",
        lambda p: p | {"query_x": p["query_x"][:3], "query_y": p["query_y"][:3]},
    ),
    "labels of another T": (ValueError, "support_y", lambda p: p | {"support_y": p["support_y"][:2]}),
    "labels of another N": (ValueError, "query_y", lambda p: p | {"query_y": p["query_y"][:, :2]}),
    "negative label": (ValueError, "support_y", lambda p: p | {"support_y": p["support_y"] - 1}),
    "labels of int32": (TypeError, "query_y", lambda p: p | {"query_y": p["query_y"].int()}),
    "labels of bool": (TypeError, "support_y", lambda p: p | {"support_y": p["support_y"].bool()}),
    "labels in two dimensions": (
        ValueError,
        "support_y",
        lambda p: p | {"support_y": p["support_y"].unsqueeze(-1)},
    ),
    "empty support": (
        ValueError,
        "support_x",
        lambda p: p | {k: p[k][:, :0] for k in ("support_x", "support_y")},
    ),
    "no tasks": (ValueError, "support_x", lambda p: {k: v[:0] for k, v in p.items()}),
    "no tensor": (TypeError, "query_x", lambda p: p | {"query_x": [[1.0]]}),
    "uint8 pictures": (TypeError, "support_x", lambda p: p | {"support_x": p["support_x"].byte()}),
    "one dimension": (ValueError, "query_y", lambda p: p | {"query_y": p["query_y"][0]}),
    "NaN": (ValueError, "support_x", lambda p: p | {"support_x": nan_at(p["support_x"], float("nan"))}),
    "infinity": (ValueError, "query_x", lambda p: p | {"query_x": nan_at(p["query_x"], float("-inf"))}),
    "other features": (ValueError, "query_x", lambda p: p | {"query_x": p["query_x"][..., :5]}),
    "other dtype": (TypeError, "query_x", lambda p: p | {"query_x": p["query_x"].float()}),
    "other device": (ValueError, "support_y", lambda p: p | {"support_y": p["support_y"].to("meta")}),
}


@pytest.mark.parametrize("what", EPISODES)
def test_episodes_refuse(what: str) -> None:
    error, name, change = EPISODES[what]
    with pytest.raises(error, match=f"^{name}: expected"):
        mf.Episodes(**change(parts()))


@pytest.mark.parametrize("kind", LEARNERS)
def test_episodes_changed_in_place_are_checked_again(kind: str) -> None:
    episodes = episodes_for("mlp")
    learner = LEARNERS[kind](build("mlp"))
    learner(episodes)
    episodes.query_x[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="^query_x: expected finite values"):
        learner(episodes)


CALLS = {
    "a label beyond the outputs": (ValueError, "query_y", parts() | {"query_y": parts()["query_y"] + 1}),
    "float32 for a float64 model": (
        TypeError,
        "support_x",
        {k: v.float() if v.is_floating_point() else v for k, v in parts().items()},
    ),
    "samples of another size": (
        ValueError,
        "support_x",
        {k: v[..., :5] if v.is_floating_point() else v for k, v in parts().items()},
    ),
    "targets that are no labels": (
        TypeError,
        "support_y",
        parts() | {"support_y": parts()["support_x"], "query_y": parts()["query_x"]},
    ),
    "inputs that want gradients": (
        ValueError,
        "support_x",
        parts() | {"support_x": parts()["support_x"].requires_grad_()},
    ),
}


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("door", ["forward", "accumulate_grad"])
def test_learners_refuse_and_change_nothing(kind: str, what: str, door: str) -> None:
    error, name, tensors = CALLS[what]
    model = build("mlp")
    learner = LEARNERS[kind](model)
    learner(episodes_for("mlp")).loss.backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in learner.parameters()]
    with pytest.raises(error, match=f"^{name}: "):
        getattr(learner, door)(mf.Episodes(**tensors))
    for parameter, (value, grad) in zip(learner.parameters(), before):
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, grad)


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_model_on_another_device(kind: str) -> None:
    with pytest.raises(ValueError, match="^support_x: expected device meta, that of the model"):
        LEARNERS[kind](build("mlp").to("meta"))(episodes_for("mlp"))


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize(
    ("error", "weights"),
    [
        (ValueError, torch.ones(3, dtype=torch.float64)),
        (ValueError, torch.ones(4, 1, dtype=torch.float64)),
        (ValueError, torch.full((4,), float("nan"), dtype=torch.float64)),
        (TypeError, torch.ones(4)),
        (TypeError, torch.ones(4, dtype=torch.int64)),
        (TypeError, [0.25] * 4),
    ],
)
def test_weights_that_do_not_fit(kind: str, error: type[Exception], weights: torch.Tensor) -> None:
    with pytest.raises(error, match="^weights: expected"):
        LEARNERS[kind](build("mlp"))(episodes_for("mlp"), weights)


@pytest.mark.parametrize("kind", LEARNERS)
def test_only_episodes(kind: str) -> None:
    with pytest.raises(TypeError, match="^episodes: expected"):
        LEARNERS[kind](build("mlp"))(torch.zeros(3))


def test_a_class_without_support() -> None:
    p = parts()
    p["support_y"][1] = 2
    with pytest.raises(ValueError, match="^support_y: every class .* task 1 has none of 0"):
        mf.ProtoNets(build("mlp"))(mf.Episodes(**p))


def test_mse_targets_that_would_broadcast() -> None:
    model = nn.Linear(2, 1)
    x, y = torch.zeros(3, 4, 2), torch.zeros(3, 4)
    with pytest.raises(ValueError, match="^support_y: expected samples of shape"):
        mf.MAML(model, loss="mse")(mf.Episodes(x, y, x, y))


ARGUMENTS = [
    (ValueError, "steps", {"steps": -1}),
    (TypeError, "steps", {"steps": 1.5}),
    (TypeError, "steps", {"steps": True}),
    (ValueError, "lr", {"lr": -0.1}),
    (ValueError, "lr", {"lr": float("nan")}),
    (ValueError, "lr", {"lr": float("inf")}),
    (TypeError, "lr", {"lr": "fast"}),
    (ValueError, "loss", {"loss": "hinge"}),
    (TypeError, "loss", {"loss": 3}),
    (TypeError, "first_order", {"first_order": 1}),
    (ValueError, "batch_norm", {"batch_norm": "train"}),
    (TypeError, "batch_norm", {"batch_norm": None}),
]


@pytest.mark.parametrize(("error", "name", "change"), ARGUMENTS)
def test_arguments_of_learners(error: type[Exception], name: str, change: dict[str, object]) -> None:
    for make in (mf.MAML, mf.LOMAML):
        with pytest.raises(error, match=f"^{name}: expected"):
            make(build("mlp"), **change)


@pytest.mark.parametrize("make", [mf.MAML, mf.LOMAML])
def test_modules_that_cannot_learn(make: type[mf.GradientLearner]) -> None:
    with pytest.raises(ValueError, match="^model: expected parameters"):
        make(nn.Flatten())
    with pytest.raises(TypeError, match="^model: expected a torch.nn.Module"):
        make(lambda x: x)
    with pytest.raises(ValueError, match="^model: parameter 'weight' is lazy"):
        make(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="^model: expected parameters of one dtype"):
        make(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()))
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="^model: expected parameters that require gradients"):
        make(frozen)


def test_arguments_of_protonets() -> None:
    with pytest.raises(ValueError, match="^metric: expected one of"):
        mf.ProtoNets(build("mlp"), metric="manhattan")
    with pytest.raises(ValueError, match="^encoder: expected parameters"):
        mf.ProtoNets(nn.Flatten())


def test_running_statistics_that_are_not_there() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="^batch_norm: 'running' needs running statistics, layer '1'"):
        mf.MAML(model, batch_norm="running")


def test_adapt_and_its_result() -> None:
    maml, p = mf.MAML(build("mlp"), steps=1), parts()
    with pytest.raises(ValueError, match="^support_y: expected labels below 3"):
        maml.adapt(p["support_x"], p["support_y"] + 1)
    with pytest.raises(ValueError, match="^steps: expected"):
        maml.adapt(p["support_x"], p["support_y"], steps=-2)
    with pytest.raises(ValueError, match="^support_x: expected finite"):
        maml.adapt(nan_at(p["support_x"], float("nan")), p["support_y"])
    adapted = maml.adapt(p["support_x"], p["support_y"])
    with pytest.raises(ValueError, match="^x: expected .* T = 4"):
        adapted(p["query_x"][:3])
    with pytest.raises(TypeError, match="^x: expected a tensor"):
        adapted([1.0])


def test_a_hand_made_step_needs_a_loss_of_this_learner() -> None:
    maml = mf.MAML(build("mlp"))
    learner, x = maml.clone(), parts()["support_x"][0]
    for loss in (torch.tensor(1.0), torch.ones(3, requires_grad=True).sum()):
        with pytest.raises(ValueError, match="^loss: expected a loss of this learner"):
            learner.adapt(loss)
    with pytest.raises(ValueError, match="^loss: expected a scalar"):
        learner.adapt(learner(x))
    with pytest.raises(ValueError, match="^loss: expected finite"):
        learner.adapt(learner(x).sum() * float("nan"))


def test_backend_names() -> None:
    with pytest.raises(ValueError, match="^name: expected one of"):
        mf.use_backend("tpu")
    assert mf.current_backend() in ("auto", "torch", "cpu")


@pytest.mark.parametrize(
    "change", [{"hidden": 0}, {"layers": 0}, {"p": 0.0}, {"hidden": 2.0}, {"p": float("nan")}, {"learn_state": 1}]
)
def test_arguments_of_the_lstm_optimizer(change: dict[str, object]) -> None:
    (name,) = change
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        mf.LSTMOptimizer(**change)
