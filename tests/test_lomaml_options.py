"""Options of LOMAML on every backend, each with each, against the plain loop: 1e-10 in float64."""

from __future__ import annotations

import itertools
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from tests.nets import build, episodes_for, gradient, relative_error
from tests.test_inner_options import HEADS, six_samples
from tests.test_learned_optimizers import OPTIMIZERS, make
from tests.test_learners import DataDependent

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.emulated_in_part]
BAR = 1e-10
STEPS = 5
QUERY_WEIGHTS = (0.3, 0.0, 1.7, -0.5, 1.0)
COMBINATIONS = [
    {"first_order": f, "learn_init": i, "adapts": a, "query_weights": q, "support_batch": b, "truncate": n}
    for f, i, a, q, b, n in itertools.product(
        (False, True), (True, False), (None, HEADS["mlp"]), (None, QUERY_WEIGHTS), (None, 2), (None, 2)
    )
]


def same(found: Tensor, wanted: Tensor) -> bool:
    """Equal up to rounding; where the one is zero the other is too."""
    if not wanted.any():
        return not found.any()
    return relative_error(found, wanted) <= BAR


def check(model: nn.Module, optimizer: mf.CoordinatewiseOptimizer, episodes: mf.Episodes, options: dict) -> None:
    """Both doors against the reference, losses and both gradients."""
    weights = torch.rand(episodes.tasks, dtype=torch.float64)
    learner = mf.LOMAML(model, optimizer, lr=0.2, steps=STEPS, **options)
    out = learner(episodes, weights)
    found = []
    for door in (out.loss.backward, lambda: learner.accumulate_grad(episodes, weights)):
        learner.zero_grad()
        door()
        found.append((gradient(model), gradient(optimizer)))
    learner.zero_grad()
    wanted = mf.reference.lomaml(model, optimizer, episodes, lr=0.2, steps=STEPS, weights=weights, **options)
    wanted.loss.backward()
    assert same(out.losses, wanted.losses) and same(out.logits, wanted.logits)
    assert gradient(optimizer).any()
    for theta, psi in found:
        assert same(theta, gradient(model))
        assert same(psi, gradient(optimizer))


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
@pytest.mark.parametrize("kind", ["learned state", "momenta"])
def test_all_combinations(kind: str, combination: dict) -> None:
    check(build("mlp"), make(kind), six_samples("mlp")[:2], combination)


@pytest.mark.parametrize("truncate", [None, 1, 3, STEPS, STEPS + 1])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", HEADS)
def test_other_nets_and_optimisers(name: str, kind: str, truncate: int | None) -> None:
    options = {"adapts": HEADS[name], "query_weights": QUERY_WEIGHTS, "support_batch": 3, "truncate": truncate}
    check(build(name), make(kind), six_samples(name)[:2], options)


@pytest.mark.not_lowered
@pytest.mark.parametrize("learn_init", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("truncate", [None, 2])
@pytest.mark.parametrize("query_weights", [None, QUERY_WEIGHTS])
@pytest.mark.parametrize("kind", ["learned state", "momenta"])
def test_by_the_loop_over_tasks(
    kind: str, query_weights: tuple | None, truncate: int | None, first_order: bool, learn_init: bool
) -> None:
    torch.manual_seed(0)
    model = DataDependent().double()
    options = {"query_weights": query_weights, "truncate": truncate, "support_batch": 2, "adapts": ["high"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*runs by a loop over tasks")
        check(
            model,
            make(kind),
            six_samples("mlp")[:2],
            options | {"first_order": first_order, "learn_init": learn_init},
        )


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("rule", ["lstm", "mlp", "sgd"])
def test_a_truncated_task_by_hand_is_the_batched_call(rule: str, first_order: bool) -> None:
    model, episodes = build("batch_norm"), episodes_for("batch_norm", tasks=1)
    update = mf.SGD(0.1) if rule == "sgd" else mf.LearnedRule(make(rule), 0.2)
    learner = mf.GradientLearner(
        model, update, steps=STEPS, query_weights=QUERY_WEIGHTS, truncate=2, first_order=first_order
    )
    learner(episodes).loss.backward()
    wanted = gradient(learner)
    learner.zero_grad()
    hand, total = learner.clone(), torch.zeros((), dtype=torch.float64)
    for weight in QUERY_WEIGHTS:
        hand = hand.clone()
        hand.adapt(nn.functional.cross_entropy(hand(episodes.support_x[0]), episodes.support_y[0]))
        total = total + weight * nn.functional.cross_entropy(hand(episodes.query_x[0]), episodes.query_y[0])
    total.backward()
    assert same(gradient(learner), wanted)
    learner.truncate = None
    learner.zero_grad()
    learner(episodes).loss.backward()
    assert relative_error(gradient(learner), wanted) > 1e-3


def test_a_cut_leaves_theta_the_losses_of_the_first_steps() -> None:
    """Of K = 5 steps cut every 2: the losses after steps 1 and 2 alone reach theta, those after step 5 only psi."""
    model, optimizer, episodes = build("mlp"), make("lstm"), six_samples("mlp")
    found = {}
    for weights in ((1.0, 1.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.0, 0.0, 1.0)):
        learner = mf.LOMAML(model, optimizer, steps=STEPS, truncate=2, query_weights=weights)
        learner.zero_grad()
        learner(episodes).loss.backward()
        found[sum(weights)] = gradient(model), gradient(optimizer)
    assert same(found[5.0][0], found[2.0][0]) and found[2.0][0].any()
    assert not found[1.0][0].any() and found[1.0][1].any()


def test_a_learned_state_against_finite_differences() -> None:
    model, episodes = build("layer_norm"), episodes_for("layer_norm", tasks=2)
    optimizer = make("learned state")
    assert isinstance(optimizer, mf.LSTMOptimizer) and optimizer.initial_state is not None
    learner, start = mf.LOMAML(model, optimizer, lr=0.5, steps=3), optimizer.initial_state
    learner(episodes).loss.backward()
    assert start.grad is not None and start.grad.shape == (1, 2, 3)
    wanted = torch.zeros_like(start)
    with torch.no_grad():
        for i in range(start.numel()):
            for sign in (1, -1):
                start.view(-1)[i] += sign * 1e-5
                wanted.view(-1)[i] += sign * learner(episodes).loss / 2e-5
                start.view(-1)[i] -= sign * 1e-5
    assert relative_error(start.grad, wanted) <= 1e-6


def test_a_pulled_back_step_of_parts_is_that_of_autograd() -> None:
    """LearnedRule's own vector-Jacobian product with `moves`, against a subclass, which goes by autograd."""

    class Generic(mf.LearnedRule):
        pass

    model, episodes, optimizer = build("mlp"), six_samples("mlp"), make("learned state")
    moves = torch.arange(sum(p.numel() for p in model.parameters())) % 3 == 0
    found = []
    for rule in (mf.LearnedRule(optimizer, 0.1, moves), Generic(optimizer, 0.1, moves)):
        assert rule._plain() == (type(rule) is mf.LearnedRule)
        learner = mf.GradientLearner(model, rule, steps=3)
        learner.zero_grad()
        learner(episodes).loss.backward()
        found.append(gradient(learner))
        adapted = learner.adapt(episodes.support_x, episodes.support_y).parameters["0.weight"].reshape(4, -1)
        assert torch.equal(adapted != model[0].weight.view(-1), moves[:66].expand(4, -1))
    assert found[0].any() and same(found[0], found[1])


def test_the_steps_are_freed_with_the_outcome() -> None:
    """At once, not by the garbage collector: nothing that the inner loop keeps refers to it."""
    kept = []

    class Watching(mf.LearnedRule):
        def step(self, params, grads, state):
            kept.extend(weakref.ref(t) for t in (params, grads, *state))
            return super().step(params, grads, state)

    learner = mf.GradientLearner(build("mlp"), Watching(make("lstm"), 0.1), steps=5, query_weights=QUERY_WEIGHTS)
    out = learner(six_samples("mlp"))
    assert len(kept) == 15 and all(ref() is not None for ref in kept)
    del out
    assert all(ref() is None for ref in kept)


@pytest.mark.parametrize(
    ("error", "name", "options"),
    [
        (TypeError, "adapts", {"adapts": "4"}),
        (ValueError, "adapts", {"adapts": ["head"]}),
        (ValueError, "query_weights", {"query_weights": (1.0,)}),
        (ValueError, "support_batch", {"support_batch": 0}),
        (ValueError, "truncate", {"truncate": 0}),
        (TypeError, "truncate", {"truncate": 2.0}),
        (TypeError, "optimizer", {"optimizer": nn.Linear(1, 1)}),
    ],
)
def test_arguments(error: type[Exception], name: str, options: dict) -> None:
    with pytest.raises(error, match=f"^{name}: expected"):
        mf.LOMAML(build("mlp"), steps=2, **options)


def test_moves_that_do_not_fit() -> None:
    optimizer = make("lstm")
    for moves in (torch.ones(3), torch.zeros(3, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"^moves: expected \(P,\) bool"):
            mf.LearnedRule(optimizer, 0.1, moves)
    learner = mf.GradientLearner(build("mlp"), mf.LearnedRule(optimizer, 0.1, torch.ones(3, dtype=torch.bool)))
    with pytest.raises(ValueError, match="^moves: expected one for each of 275, got 3"):
        learner(six_samples("mlp"))
