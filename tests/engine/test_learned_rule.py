"""LOMAML's meta-step as one native call: every option, both doors, kept and computed-again gates, any threads."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from metafast.rules import LearnedRule, moving
from tests.backends import kernels_of, native, on_cpu_and_simt
from tests.nets import build, episodes_for, gradient, relative_error

pytestmark = pytest.mark.usefixtures("native_backend")
BAR = 1e-10


@pytest.fixture
def native_backend(request: pytest.FixtureRequest) -> object:
    call = getattr(request.node, "callspec", None)
    with mf.use_backend("cpu" if call is None else call.params.get("backend", "cpu")):
        yield


class Stepwise(LearnedRule):
    """A subclass could step otherwise, so it goes step by step, by another path than the one call."""


def optimizer_of(hidden: int = 5, layers: int = 2, learn_state: bool = False) -> mf.LSTMOptimizer:
    torch.manual_seed(0)
    optimizer = mf.LSTMOptimizer(hidden, layers, learn_state=learn_state).double()
    with torch.no_grad():
        for w in optimizer.parameters():
            w.add_(0.2 * torch.randn_like(w))
    return optimizer


def is_one_call(learner: mf.GradientLearner, episodes: mf.Episodes) -> bool:
    network = learner._check(episodes, None)
    return network is not None and learner._fused(episodes, None) is not None


OPTIONS = list(itertools.product((False, True), (None, (0.3, 0.0, 1.7)), (None, 3), (None, 1, 2)))
NETS = [("mlp", True, False, None), ("mlp", False, True, ["2", "4.bias"]), ("conv4", True, True, ["head"])]
CASES = [pytest.param("cpu", *o, *net, marks=kernels_of("cpu")) for net in NETS for o in OPTIONS]
# Some of each for the emulator.
CASES += [pytest.param("simt", *o, *net, marks=kernels_of("simt")) for net in NETS[:2] for o in OPTIONS[1::5]]


@pytest.mark.parametrize(
    (
        *("backend", "first_order", "query_weights", "batch", "truncate"),
        *("name", "learn_init", "learn_state", "adapts"),
    ),
    CASES,
)
def test_options(
    backend: str,
    name: str,
    learn_init: bool,
    learn_state: bool,
    adapts: list[str] | None,
    first_order: bool,
    query_weights: tuple | None,
    batch: int | None,
    truncate: int | None,
) -> None:
    """Both doors, against the path step by step and the reference."""
    model, episodes, weights = build(name), episodes_for(name), torch.rand(4, dtype=torch.float64)
    optimizer = optimizer_of(learn_state=learn_state)
    moves = None if adapts is None else moving(model, adapts)
    options = {"query_weights": query_weights, "support_batch": batch, "truncate": truncate}
    found: list[list[Tensor]] = []
    for rule in (Stepwise, LearnedRule):
        learner = mf.GradientLearner(
            model, rule(optimizer, 0.3, moves), 3, first_order=first_order, learn_init=learn_init, **options
        )
        assert is_one_call(learner, episodes) == (rule is LearnedRule)
        for accumulate in (False, True):
            learner.zero_grad()
            if accumulate:
                out = learner.accumulate_grad(episodes, weights)
            else:
                out = learner(episodes, weights)
                out.loss.backward()
            assert learn_init == (next(iter(model.parameters())).grad is not None)
            found.append([gradient(learner), out.losses, out.logits, out.loss])
    learner.zero_grad()
    out = mf.reference.lomaml(
        model,
        optimizer,
        episodes,
        lr=0.3,
        steps=3,
        first_order=first_order,
        learn_init=learn_init,
        weights=weights,
        adapts=adapts,
        **options,
    )
    out.loss.backward()
    for one in found:
        for mine, wanted in zip(one, [gradient(learner), out.losses, out.logits, out.loss]):
            assert relative_error(mine, wanted) <= BAR


@on_cpu_and_simt
@pytest.mark.parametrize("truncate", [1, 2])
def test_truncation_of_plain_steps(truncate: int, backend: str) -> None:
    model, episodes = build("mlp"), episodes_for("mlp")

    class Same(mf.SGD):
        """A subclass could step otherwise, so it goes step by step."""

    found = []
    for rule in (Same(0.2), mf.SGD(0.2)):
        learner = mf.GradientLearner(model, rule, 4, query_weights=(1.0, 0.5, 0.0, 2.0), truncate=truncate)
        learner.zero_grad()
        assert is_one_call(learner, episodes) == (type(rule) is mf.SGD)
        learner.accumulate_grad(episodes)
        found.append(gradient(model))
    assert relative_error(found[1], found[0]) <= BAR


@on_cpu_and_simt
@pytest.mark.parametrize(("hidden", "layers"), [(1, 1), (7, 1), (20, 2), (3, 4)])
@pytest.mark.parametrize("first_order", [False, True])
def test_the_reference(hidden: int, layers: int, first_order: bool, backend: str) -> None:
    model, episodes, optimizer = build("mlp"), episodes_for("mlp", tasks=1), optimizer_of(hidden, layers)
    learner = mf.LOMAML(model, optimizer, lr=0.2, steps=4, first_order=first_order)
    assert is_one_call(learner, episodes)
    out = learner(episodes)
    out.loss.backward()
    mine = gradient(learner)
    learner.zero_grad()
    wanted = mf.reference.lomaml(model, optimizer, episodes, lr=0.2, steps=4, first_order=first_order)
    wanted.loss.backward()
    assert relative_error(mine, gradient(learner)) <= BAR
    assert relative_error(out.logits, wanted.logits) <= BAR


@native
def test_gates_that_are_computed_again_and_any_number_of_threads() -> None:
    """More coordinates than the gates of all steps are kept for; the odd number of them leaves a block unfilled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 97), nn.Tanh(), nn.Linear(97, 71), nn.Tanh(), nn.Linear(71, 3)).double()
    episodes, optimizer = episodes_for("mlp", tasks=5), optimizer_of(20)
    learner = mf.LOMAML(model, optimizer, lr=0.1, steps=4)
    found = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        learner.zero_grad()
        learner.accumulate_grad(episodes)
        found[threads] = gradient(learner)
    assert torch.equal(found[1], found[2]) and torch.equal(found[1], found[3])
    learner.zero_grad()
    mf.reference.lomaml(model, optimizer, episodes, lr=0.1, steps=4).loss.backward()
    assert relative_error(found[1], gradient(learner)) <= BAR


@on_cpu_and_simt
def test_any_cotangent_and_twice_through_the_same_graph(backend: str) -> None:
    model, episodes, optimizer = build("batch_norm"), episodes_for("batch_norm"), optimizer_of()
    learner = mf.LOMAML(model, optimizer, lr=0.2, steps=2)

    def objective(out: mf.Outcome) -> Tensor:
        return out.loss * 0.5 + (out.losses**2).sum() + (out.logits.tanh() * 0.3).sum()

    loss = objective(learner(episodes))
    loss.backward(retain_graph=True)
    once = gradient(learner)
    loss.backward()
    assert relative_error(gradient(learner), 2 * once) <= 1e-14
    learner.zero_grad()
    objective(mf.reference.lomaml(model, optimizer, episodes, lr=0.2, steps=2)).backward()
    assert relative_error(once, gradient(learner)) <= BAR
    grads = torch.autograd.grad(learner(episodes).loss, list(learner.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grads[0].sum().backward()


@on_cpu_and_simt
def test_frozen_parameters_stay_and_a_frozen_optimizer_gets_no_gradient(backend: str) -> None:
    model, episodes, optimizer = build("mlp"), episodes_for("mlp"), optimizer_of()
    model[0].requires_grad_(False)
    optimizer.requires_grad_(False)
    found = []
    for rule in (Stepwise, LearnedRule):
        learner = mf.GradientLearner(model, rule(optimizer, 0.3), steps=3)
        learner.zero_grad()
        learner.accumulate_grad(episodes)
        assert all(p.grad is None for p in (*model[0].parameters(), *optimizer.parameters()))
        found.append(gradient(model))
    assert relative_error(found[1], found[0]) <= BAR


@on_cpu_and_simt
def test_no_gradient_is_no_graph_and_the_same_numbers(backend: str) -> None:
    model, episodes, optimizer = build("mlp"), episodes_for("mlp"), optimizer_of()
    for steps in (0, 1, 5):
        learner = mf.LOMAML(model, optimizer, lr=0.2, steps=steps)
        with torch.no_grad():
            out = learner(episodes)
        assert not out.loss.requires_grad
        assert torch.equal(out.logits, learner(episodes).logits.detach())


@on_cpu_and_simt
def test_float32_errs_at_most_twice_as_much_as_torch_in_float32(backend: str) -> None:
    model, episodes = build("mlp"), episodes_for("mlp", tasks=8 if backend == "cpu" else 2)
    optimizer = optimizer_of(20)
    found = {}
    for run, dtype in (("exact", torch.float64), ("plain", torch.float32), ("native", torch.float32)):
        net, rule, e = copy.deepcopy(model).to(dtype), copy.deepcopy(optimizer).to(dtype), episodes.to(dtype=dtype)
        learner = mf.LOMAML(net, rule, lr=0.1, steps=5)
        if run == "native":
            learner.accumulate_grad(e)
        else:
            mf.reference.lomaml(net, rule, e, lr=0.1, steps=5).loss.backward()
        found[run] = gradient(learner).double()
    error, plain = (relative_error(found[run], found["exact"]) for run in ("native", "plain"))
    assert error <= 2 * plain + 1e-6
