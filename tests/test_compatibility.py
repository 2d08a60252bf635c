"""PyTorch's own tools around learners: torch.compile, autocast, optimizers, modes, state dicts of other versions."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from metafast import _native
from tests.nets import build, episodes_for, gradient, relative_error
from tests.test_robustness import LEARNERS, every_learner, made

STORED = Path(__file__).parent / "files/state_dicts-0.1.0.pt"


def model_of(learner: Any) -> nn.Module:
    return learner.encoder if isinstance(learner, mf.ProtoNets) else learner.model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own look
@pytest.mark.parametrize("kind", ["maml", "lomaml", "protonets"])
@pytest.mark.usefixtures("backend")
def test_compiled_learners_and_steps(kind: str) -> None:
    """A learner's call breaks the graph: the same bits, whether it is compiled itself or what calls it."""
    learner, episodes = made(kind), episodes_for("mlp")
    wanted = learner(episodes)
    wanted.loss.backward()
    grads = gradient(learner)

    def step(scale: Tensor) -> Tensor:
        out = learner.accumulate_grad(episodes)
        return scale.sin() * out.losses.sum()

    def logits(scale: Tensor) -> Tensor:
        return scale.sin() * learner.adapt(episodes.support_x, episodes.support_y)(episodes.query_x)

    scale = torch.tensor(0.5, dtype=torch.float64)
    fitted = logits(scale).detach()
    torch.compiler.reset()
    compiled = torch.compile(learner, backend="aot_eager")
    for _ in range(2):
        learner.zero_grad()
        out = compiled(episodes)
        out.loss.backward()
        assert torch.equal(out.losses, wanted.losses) and torch.equal(gradient(learner), grads)
    run = torch.compile(step, backend="aot_eager")
    for _ in range(2):
        learner.zero_grad()
        assert relative_error(run(scale), scale.sin() * wanted.losses.sum()) <= 1e-14
        assert torch.equal(gradient(learner), grads)
    assert relative_error(torch.compile(logits, backend="aot_eager")(scale), fitted) <= 1e-14
    torch.compiler.reset()  # or what was compiled with breaks is taken
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(scale)
    torch.compiler.reset()


REFERENCES: dict[str, Callable[[Any, mf.Episodes], Any]] = {
    "maml": lambda it, e: mf.reference.maml(it.model, e, lr=0.1, steps=2),
    "lomaml": lambda it, e: mf.reference.lomaml(it.model, it.optimizer, e, lr=0.1, steps=2),
    "protonets": lambda it, e: mf.reference.protonets(it.encoder, e),
}


def smooth(kind: str) -> Any:
    torch.manual_seed(0)
    model = build("layer_norm")
    return {
        "maml": lambda: mf.MAML(model, lr=0.1, steps=2),
        "lomaml": lambda: mf.LOMAML(model, mf.LSTMOptimizer(hidden=3).double(), lr=0.1, steps=2),
        "protonets": lambda: mf.ProtoNets(model),
    }[kind]()


@pytest.mark.parametrize("kind", REFERENCES)
def test_bfloat16_autocast(kind: str) -> None:
    """By torch, with one warning, to at most twice the error of the plain loop under autocast, plus one rounding."""
    learner, episodes = smooth(kind), episodes_for("layer_norm")
    exact = learner(episodes)
    exact.loss.backward()
    grads = gradient(learner)
    learner, episodes = learner.float(), episodes.to(dtype=torch.float32)

    def errors(run: Callable[[], Any]) -> tuple[float, float]:
        learner.zero_grad()
        out = run()
        assert all(p.grad.dtype == torch.float32 for p in learner.parameters())
        return relative_error(out.losses.double(), exact.losses), relative_error(gradient(learner).double(), grads)

    def plain() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            out = REFERENCES[kind](learner, episodes)
        out.loss.backward()
        return out

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            out = learner(episodes)
        out.loss.backward()
        return out

    def accumulated() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return learner.accumulate_grad(episodes)

    allowed = [2 * error + 2**-8 for error in errors(plain)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for door in (forward, accumulated):
            for found, bar in zip(errors(door), allowed):
                assert 1e-7 <= found <= bar <= 0.2, door.__name__
    # Without an extension torch is no surprise. Layer norm and autocast do not go through vmap together.
    said = [str(w.message) for w in caught if "metafast" in str(w.message)]
    assert len(said) <= 1
    if _native.status().available:
        assert "autocast is on" in said[0] or "runs by a loop over tasks, which is slower" in said[0]


def bfloat16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.filterwarnings("ignore:metafast. Sequential runs by")
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", LEARNERS)
def test_accumulate_grad_under_autocast_is_backward_behind_it(kind: str, ragged: bool) -> None:
    learner, episodes = made(kind).float(), episodes_for("mlp").to(dtype=torch.float32)
    if ragged:
        mask = torch.ones_like(episodes.support_y, dtype=torch.bool)
        mask[0, -1] = False
        episodes = dataclasses.replace(episodes, support_mask=mask)
    with bfloat16():
        out = learner(episodes)
    out.loss.backward()
    wanted = gradient(learner)
    learner.zero_grad()
    with bfloat16():
        found = learner.accumulate_grad(episodes)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found.losses, out.losses)
    if ragged:  # a sum over groups, made in another order
        assert relative_error(gradient(learner), wanted) <= 1e-6
    else:
        assert torch.equal(gradient(learner), wanted)


class Telling(torch.autograd.Function):
    """The identity; its backward notes whether autocast is on."""

    generate_vmap_rule = True
    told: tuple[bool, ...] = ()

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        Telling.told += (torch.is_autocast_enabled("cpu"),)
        return cotangent


class Tells(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        told: Tensor = Telling.apply(x)
        return told


@pytest.mark.filterwarnings("ignore:metafast. Sequential runs by")
def test_a_backward_pass_does_not_see_autocast() -> None:
    learner = mf.ProtoNets(nn.Sequential(nn.Linear(6, 4), Tells()))
    episodes = episodes_for("mlp").to(dtype=torch.float32)
    Telling.told = ()
    with bfloat16():
        learner.accumulate_grad(episodes)
    assert Telling.told and not any(Telling.told)


@pytest.mark.filterwarnings("ignore:metafast. Sequential runs by")
@pytest.mark.parametrize("kind", ["mlp", "layer_norm"])  # the latter goes through vmap without autocast alone
@pytest.mark.parametrize("first", [False, True])
def test_nothing_stays_of_autocast_nor_of_its_lack(kind: str, first: bool) -> None:
    """Recordings of recurrent calls, after a dozen, and the choice of the loop are each kind of call's own."""
    episodes = episodes_for(kind).to(dtype=torch.float32)

    def run(learner: Any, under: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=under):
            out = learner(episodes)
        learner.zero_grad()
        out.loss.backward()
        return [out.losses.detach(), gradient(learner)]

    with mf.use_backend("torch"):
        wanted = {under: run(mf.MAML(build(kind).float(), lr=0.1, steps=2), under) for under in (False, True)}
        assert not torch.equal(wanted[False][0], wanted[True][0])
        learner = mf.MAML(build(kind).float(), lr=0.1, steps=2)
        for under in (first, not first, first):
            for _ in range(16):
                found = run(learner, under)
                assert all(torch.equal(a, b) for a, b in zip(found, wanted[under]))


# Those that take only sparse gradients are for embeddings.
OPTIMIZERS = sorted(
    name
    for name, it in vars(torch.optim).items()
    if isinstance(it, type) and issubclass(it, torch.optim.Optimizer) and name not in ("Optimizer", "SparseAdam")
)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch(name: str) -> None:
    """With weight decay where it has it, by a closure, under a schedule; the loss falls and theta and psi move."""
    learner, episodes = made("lomaml"), episodes_for("mlp")
    before = [p.detach().clone() for p in learner.parameters()]
    start = learner(episodes).loss.item()
    # Muon's are matrices.
    learned = [p for p in learner.parameters() if p.dim() == 2 or name != "Muon"]
    decay = {} if name in ("LBFGS", "Rprop") else {"weight_decay": 1e-4}
    search = {"line_search_fn": "strong_wolfe"} if name == "LBFGS" else {}
    outer = getattr(torch.optim, name)(learned, lr=1e-2, **decay, **search)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(outer, 10)

    def closure() -> Tensor:
        outer.zero_grad()
        out = learner(episodes)
        out.loss.backward()
        return out.loss

    for _ in range(3):
        outer.step(closure)
        schedule.step()
    assert learner(episodes).loss.item() < start
    for p, old in zip(learner.parameters(), before):
        assert torch.isfinite(p).all() and (torch.equal(p, old) != any(p is q for q in learned))


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.5**k),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "WarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str) -> None:
    """Each step is the rate that the schedule says."""
    learner, episodes = made("maml"), episodes_for("mlp")
    outer = torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.0)
    schedule = SCHEDULES[name](outer)
    outer.param_groups[0]["momentum"] = 0.0  # which some cycle
    rates = []
    for _ in range(3):
        outer.zero_grad()
        out = learner.accumulate_grad(episodes)
        before = nn.utils.parameters_to_vector(learner.parameters()).detach()
        rate = outer.param_groups[0]["lr"]
        outer.step()
        moved = before - nn.utils.parameters_to_vector(learner.parameters()).detach()
        assert relative_error(moved, rate * gradient(learner)) <= 1e-12
        schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        outer.param_groups[0]["momentum"] = 0.0
        rates.append(rate)
        assert torch.isfinite(out.loss)
    assert len(set(rates)) > 1


@every_learner
def test_inference_mode(kind: str) -> None:
    """The same numbers, with tensors made inside too; a gradient is refused, not left out."""
    learner, episodes = made(kind), episodes_for("mlp")
    wanted = learner(episodes)
    wanted.loss.backward()
    grads = gradient(learner)
    with torch.inference_mode():
        assert torch.equal(learner(episodes).losses, wanted.losses)
        made_inside = episodes_for("mlp")
        assert made_inside.support_x.is_inference()
        assert torch.equal(learner(made_inside).losses, wanted.losses)
        logits = learner.adapt(episodes.support_x, episodes.support_y)(episodes.query_x)
        assert relative_error(logits, wanted.logits) <= 1e-12
        with pytest.raises(RuntimeError, match=r"^accumulate_grad: torch\.inference_mode makes no gradients"):
            learner.accumulate_grad(episodes)
    assert torch.equal(gradient(learner), grads)
    learner.zero_grad()
    learner.accumulate_grad(episodes)  # nothing of it has stayed
    assert relative_error(gradient(learner), grads) <= 1e-14


@pytest.mark.parametrize("kind", ["maml", "lomaml", "protonets", "reptile"])
def test_freezing_a_parameter_on_the_way(kind: str) -> None:
    """A learner's parameters are what they were when it was made: others are refused, a new learner takes them."""
    learner, episodes = made(kind), episodes_for("mlp")
    learner(episodes).loss.backward()
    grads = gradient(learner)
    weight = model_of(learner)[0].weight  # type: ignore[index]
    weight.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable parameters changed since the learner was made; make a new"):
        learner(episodes)
    weight.requires_grad_(True)
    learner.zero_grad()
    learner(episodes).loss.backward()
    assert torch.equal(gradient(learner), grads)
    # What is only to be left alone by the outer optimiser need not be frozen.
    outer = torch.optim.SGD([p for p in learner.parameters() if p is not weight], lr=0.1)
    before = weight.detach().clone()
    outer.step()
    assert torch.equal(weight, before)


def test_vectors_of_parameters() -> None:
    learner, episodes = made("lomaml"), episodes_for("mlp")
    before = learner(episodes).losses
    vector = nn.utils.parameters_to_vector(learner.parameters()).detach()
    nn.utils.vector_to_parameters(1.1 * vector, learner.parameters())
    changed = learner(episodes).losses
    assert not torch.equal(changed, before)
    other = made("lomaml")
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    assert relative_error(changed, other(episodes).losses) <= 1e-14
    nn.utils.vector_to_parameters(vector, learner.parameters())
    assert torch.equal(learner(episodes).losses, before)


def test_episodes_rules_and_optimizers_are_pickled() -> None:
    episodes = episodes_for("mlp")
    again = pickle.loads(pickle.dumps(episodes))
    assert isinstance(again, mf.Episodes) and torch.equal(again.query_x, episodes.query_x)
    model = build("mlp")
    rules = (mf.rules.SGD(0.1), mf.Momentum(0.1), mf.LearnedRates(model, 0.1), mf.LayerRates(model, 2, 0.1))
    optimizers = (mf.LSTMOptimizer(3).double(), mf.MLPOptimizer().double())
    for thing in rules:
        twin = pickle.loads(pickle.dumps(thing))
        found, wanted = (mf.GradientLearner(model, rule, steps=2)(episodes).losses for rule in (twin, thing))
        assert torch.equal(found, wanted), thing
    for optimizer in optimizers:
        twin = pickle.loads(pickle.dumps(optimizer))
        found, wanted = (mf.LOMAML(model, it, steps=2)(episodes).losses for it in (twin, optimizer))
        assert torch.equal(found, wanted), optimizer


def test_state_dicts_of_an_earlier_version() -> None:
    """What 0.1.0 has saved goes into today's learners, by the same names, and gives the same losses."""
    stored = torch.load(STORED, weights_only=True)
    assert list(stored) == list(LEARNERS)
    for kind, (state, losses) in stored.items():
        learner = made(kind)
        assert learner.load_state_dict(state, strict=True).missing_keys == [], kind
        assert relative_error(learner(episodes_for("mlp")).losses, losses) <= 1e-10, kind


@pytest.mark.parametrize("kind", LEARNERS)
def test_state_dicts_that_do_not_fit(kind: str) -> None:
    learner = made(kind)
    before = learner(episodes_for("mlp")).losses
    state = learner.state_dict()
    name = next(iter(state))
    missing = {key: value for key, value in state.items() if key != name}
    for wrong, message in (
        (missing, "Missing key"),
        (state | {"more": torch.zeros(1)}, "Unexpected key"),
        (state | {name: torch.zeros(2, 3, 5)}, "size mismatch"),
    ):
        with pytest.raises(RuntimeError, match=message):
            learner.load_state_dict(wrong)
    assert torch.equal(learner(episodes_for("mlp")).losses, before)
