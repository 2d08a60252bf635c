"""The short way of a call like one before: taken where nothing changed, left for the long one where anything did."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from metafast.engine.again import again
from metafast.learners.base import GradientLearner
from tests.backends import kernels_of
from tests.nets import build, episodes_for, gradient, relative_error

BAR = 1e-10
DOORS = ("autograd", "accumulate_grad")
on_doors = pytest.mark.parametrize("door", DOORS)
pytestmark = kernels_of("cpu")


@pytest.fixture
def long_ways(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for each call that was checked in Python."""
    calls: list[object] = []
    checked = GradientLearner._check

    def check(self: GradientLearner, *arguments: object) -> object:
        calls.append(self)
        return checked(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(GradientLearner, "_check", check)
    return calls


def learner_of(**options: object) -> mf.MAML:
    return mf.MAML(build("mlp"), **{"lr": 0.2, "steps": 2} | options)  # type: ignore[arg-type]


def step(learner: GradientLearner, episodes: mf.Episodes, door: str, weights: Tensor | None = None) -> mf.Outcome:
    learner.zero_grad()
    if door == "accumulate_grad":
        return learner.accumulate_grad(episodes, weights)
    out = learner(episodes, weights)
    out.loss.backward()
    return out


def agrees(learner: mf.MAML, episodes: mf.Episodes, out: mf.Outcome, **options: object) -> None:
    """The outcome and ``.grad`` are those of plain autograd."""
    found = gradient(learner)
    learner.zero_grad()
    wanted = mf.reference.maml(learner.model, episodes, **{"lr": 0.2, "steps": 2} | options)  # type: ignore[arg-type]
    wanted.loss.backward()
    for name in ("loss", "losses", "logits"):
        assert relative_error(getattr(out, name), getattr(wanted, name)) < BAR, name
    assert out.accuracy is not None and torch.equal(out.accuracy, wanted.accuracy)
    assert relative_error(found, gradient(learner)) < BAR


@on_doors
def test_a_call_like_the_one_before_is_not_checked_again(door: str, long_ways: list[object]) -> None:
    learner, episodes = learner_of(), episodes_for("mlp")
    first = step(learner, episodes, door)
    assert len(long_ways) == 1
    kept = gradient(learner)
    second = step(learner, episodes, door)
    assert len(long_ways) == 1
    assert torch.equal(gradient(learner), kept) and torch.equal(first.logits, second.logits)
    other = episodes_for("mlp", seed=7)
    agrees(learner, other, step(learner, other, door))
    assert len(long_ways) == 1


class Half(mf.SGD):
    def step(self, params: Tensor, grads: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return params - self.lr / 2 * grads, state


def attributes_of(module: nn.Module, **changed: object) -> None:
    """Another dictionary of attributes, the old one as it was."""
    object.__setattr__(module, "__dict__", vars(module) | changed)


def to_tanh(learner: mf.MAML) -> None:
    learner.model[1] = nn.Tanh()


CHANGES: dict[str, tuple[Callable[[mf.MAML], object], dict[str, object]]] = {
    "steps": (lambda m: setattr(m, "steps", 3), {"steps": 3}),
    "rate": (lambda m: setattr(m.rule, "lr", 0.3), {"lr": 0.3}),
    "rule": (lambda m: setattr(m, "rule", mf.SGD(0.1)), {"lr": 0.1}),
    "first_order": (lambda m: setattr(m, "first_order", True), {"first_order": True}),
    "query_weights": (lambda m: setattr(m, "query_weights", (0.5, 2.0)), {"query_weights": (0.5, 2.0)}),
    "support_batch": (lambda m: setattr(m, "support_batch", 3), {"support_batch": 3}),
    "activation": (to_tanh, {}),
    "numbers of parameters": (lambda m: m.model[0].weight.data.mul_(1.5), {}),
    "attributes": (lambda m: attributes_of(m, steps=3), {"steps": 3}),
    "attributes of the rule": (lambda m: attributes_of(m.rule, lr=0.3), {"lr": 0.3}),
    "a parameter": (lambda m: setattr(m.model[0], "bias", nn.Parameter(m.model[0].bias.detach() + 1)), {}),
}


@on_doors
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_calls_counts(name: str, door: str, long_ways: list[object]) -> None:
    change, options = CHANGES[name]
    learner, episodes = learner_of(), episodes_for("mlp")
    for _ in range(2):
        step(learner, episodes, door)
    assert len(long_ways) == 1
    change(learner)
    for _ in range(2):
        agrees(learner, episodes, step(learner, episodes, door), **options)
    assert len(long_ways) == (1 if name == "numbers of parameters" else 2)


@on_doors
def test_episodes_changed_in_place_are_checked(door: str, long_ways: list[object]) -> None:
    learner, episodes = learner_of(), episodes_for("mlp")
    step(learner, episodes, door)
    episodes.query_x.mul_(0.5)
    agrees(learner, episodes, step(learner, episodes, door))
    assert len(long_ways) == 2
    episodes.support_x[0, 0, 0] = torch.nan
    learner.zero_grad()
    with pytest.raises(ValueError, match="support_x: expected finite"):
        step(learner, episodes, door)
    assert all(p.grad is None for p in learner.parameters())


@on_doors
def test_other_episodes_are_checked(door: str, long_ways: list[object]) -> None:
    learner, episodes = learner_of(), episodes_for("mlp")
    step(learner, episodes, door)
    fewer = mf.Episodes(episodes.support_x[:, :3], episodes.support_y[:, :3], episodes.query_x, episodes.query_y)
    agrees(learner, fewer, step(learner, fewer, door))
    assert len(long_ways) == 2
    agrees(learner, episodes[:1], step(learner, episodes[:1], door))  # back, and of one task alone
    assert len(long_ways) == 3
    with pytest.raises(TypeError, match="support_x: expected dtype"):
        step(learner, episodes.to(dtype=torch.float32), door)
    with pytest.raises(TypeError, match="episodes: expected"):
        step(learner, (1, 2), door)  # type: ignore[arg-type]
    wanting = mf.Episodes(episodes.support_x.clone().requires_grad_(), *episodes._tensors()[1:])
    with pytest.raises(ValueError, match="support_x: gradients to inputs"):
        step(learner, wanting, door)


@on_doors
def test_sizes_that_alternate_are_looked_at_once_each(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, episodes, made = learner_of(), episodes_for("mlp"), []
    fewer = mf.Episodes(episodes.support_x[:, :3], episodes.support_y[:, :3], episodes.query_x, episodes.query_y)

    def counted(*arguments: object) -> object:
        made.append(arguments)
        return again(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("metafast.learners.base.again", counted)
    for _ in range(3):
        for e in (episodes, fewer):
            agrees(learner, e, step(learner, e, door))
    weights = torch.ones(episodes.tasks, dtype=torch.float64)
    step(learner, episodes, door, weights)
    with torch.inference_mode():
        learner(episodes)
    assert len(made) == 2
    learner.steps = 3
    for _ in range(2):
        for e in (episodes, fewer):
            agrees(learner, e, step(learner, e, door), steps=3)
    assert len(made) == 4


@on_doors
def test_weights_are_for_the_long_way(door: str, long_ways: list[object]) -> None:
    learner, episodes = learner_of(), episodes_for("mlp")
    step(learner, episodes, door)
    weights = torch.linspace(0.1, 1, episodes.tasks, dtype=torch.float64)
    out = step(learner, episodes, door, weights)
    assert len(long_ways) == 2
    assert relative_error(out.loss, (weights * out.losses).sum()) < BAR


@on_doors
def test_a_forced_backend_is_heard(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, episodes = learner_of(), episodes_for("mlp")
    step(learner, episodes, door)

    def not_here(*_: object) -> None:
        raise AssertionError("the native meta-step ran")

    assert learner._task.native.again is not None
    with mf.use_backend("torch"):
        monkeypatch.setattr("metafast.engine.networks.NativeNetwork.meta_step", not_here)
        assert learner._task.native.again(learner, episodes, door == "accumulate_grad") is None
        agrees(learner, episodes, step(learner, episodes, door))


def test_a_parameters_hook_is_called() -> None:
    learner, episodes, seen = learner_of(), episodes_for("mlp"), []
    step(learner, episodes, "accumulate_grad")
    kept = gradient(learner)
    learner.model[0].weight.register_hook(lambda g: seen.append(g))
    step(learner, episodes, "accumulate_grad")
    assert len(seen) == 1 and torch.equal(gradient(learner), kept)


def test_modes_that_make_no_gradients() -> None:
    learner, episodes = learner_of(), episodes_for("mlp")
    wanted = step(learner, episodes, "accumulate_grad")
    with torch.no_grad():
        assert not learner(episodes).loss.requires_grad
        assert torch.equal(learner(episodes).loss, wanted.loss)
    with torch.inference_mode():
        assert learner(episodes).loss.is_inference()
        with pytest.raises(RuntimeError, match="inference_mode makes no gradients"):
            learner.accumulate_grad(episodes)
    short = learner._task.native.again
    assert short is not None and short(learner, episodes, False) is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert short(learner, episodes, False) is None


class Warming(mf.MAML):
    """Its rate is not among what is watched."""

    def _fused(self, *arguments: object) -> object:
        inner = super()._fused(*arguments)  # type: ignore[arg-type]
        return inner._replace(rates=RATES.pop())  # type: ignore[union-attr]


class Scheduled(mf.MAML):
    """Nor are its steps."""

    steps = property(lambda self: SCHEDULE[0], lambda self, steps: None)  # type: ignore[assignment]


class Penalised(mf.MAML):
    def _dense(self, *arguments: object) -> mf.Outcome:
        out = super()._dense(*arguments)  # type: ignore[arg-type]
        return mf.Outcome(out.loss + 1, out.losses, out.logits, out.accuracy)


RATES: list[float] = []
SCHEDULE = [2]


def test_subclasses_that_do_otherwise_are_always_asked() -> None:
    episodes = episodes_for("mlp")
    warming = Warming(build("mlp"), steps=2)
    for door in DOORS:
        for rate in (0.1, 0.2):
            RATES.append(rate)
            agrees(warming, episodes, step(warming, episodes, door), lr=rate)
    scheduled = Scheduled(build("mlp"), lr=0.2)
    for steps in (2, 3):
        SCHEDULE[0] = steps
        agrees(scheduled, episodes, step(scheduled, episodes, "accumulate_grad"), steps=steps)
    plain, penalised = learner_of(), Penalised(build("mlp"), lr=0.2, steps=2)
    for _ in range(2):
        assert relative_error(penalised(episodes).loss, plain(episodes).loss + 1) < BAR


def test_a_subclass_with_a_constructor_alone_goes_the_short_way(long_ways: list[object]) -> None:
    class Mine(mf.MAML):
        """MAML with settings of its own."""

        def __init__(self) -> None:
            super().__init__(build("mlp"), lr=0.2, steps=2)
            self.name = "mine"

    learner, episodes = Mine(), episodes_for("mlp")
    for _ in range(3):
        agrees(learner, episodes, step(learner, episodes, "accumulate_grad"))
    assert len(long_ways) == 1


@on_doors
def test_the_class_of_the_rule_is_asked(door: str) -> None:
    learner, episodes = learner_of(), episodes_for("mlp")
    step(learner, episodes, door)
    learner.rule.__class__ = Half
    agrees(learner, episodes, step(learner, episodes, door), lr=0.1)


@on_doors
def test_methods_of_the_object_are_asked(door: str) -> None:
    rates = [0.2, 0.1]
    learner, episodes = learner_of(), episodes_for("mlp")
    learner.rule.plain_rates = lambda *_: rates.pop()  # type: ignore[method-assign]
    for rate in (0.1, 0.2):
        agrees(learner, episodes, step(learner, episodes, door), lr=rate)


@on_doors
def test_numbers_that_change_in_place_are_looked_at(door: str) -> None:
    learner, episodes = learner_of(steps=2), episodes_for("mlp")
    learner.steps = torch.tensor(2)  # type: ignore[assignment]
    step(learner, episodes, door)
    learner.steps += 1
    agrees(learner, episodes, step(learner, episodes, door), steps=3)


@on_doors
def test_a_shallow_copy_goes_by_its_own_settings(door: str) -> None:
    learner, episodes = learner_of(), episodes_for("mlp")
    step(learner, episodes, door)
    other = copy.copy(learner)
    other.steps = 3
    agrees(other, episodes, step(other, episodes, door), steps=3)
    agrees(learner, episodes, step(learner, episodes, door))
    learner.steps = 4
    agrees(learner, episodes, step(learner, episodes, door), steps=4)
    agrees(other, episodes, step(other, episodes, door), steps=3)


@on_doors
def test_copies_and_threads(door: str, long_ways: list[object]) -> None:
    learner, episodes = learner_of(), episodes_for("mlp")
    step(learner, episodes, door)
    kept = gradient(learner)
    for other in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(0.5)
        agrees(other, episodes, step(other, episodes, door))
    assert torch.equal(gradient(learner), kept)
    learners, outcomes = [copy.deepcopy(learner) for _ in range(4)], []
    together = [
        threading.Thread(target=lambda m=m: outcomes.extend(step(m, episodes, door) for _ in range(20)))
        for m in learners
    ]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert len(outcomes) == 80
    assert all(torch.equal(gradient(m), kept) for m in learners)


def test_a_learner_that_is_gone_is_freed() -> None:
    learner, episodes = learner_of(), episodes_for("mlp")
    for door in DOORS:
        for _ in range(2):
            step(learner, episodes, door)
    found = [weakref.ref(learner), weakref.ref(learner.model), weakref.ref(learner.model[0].weight)]
    del learner
    gc.collect()
    assert [ref() for ref in found] == [None, None, None]


def test_an_outcome_is_as_the_long_ways(long_ways: list[object]) -> None:
    learner, episodes = learner_of(), episodes_for("mlp")
    first, second = (step(learner, episodes, "accumulate_grad") for _ in range(2))
    assert len(long_ways) == 1
    assert type(second) is type(first) and vars(second).keys() == vars(first).keys()
    with pytest.raises(AttributeError):
        second.loss = first.loss  # type: ignore[misc]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own look
def test_a_compiled_learner_is_compiled_once() -> None:
    learner, episodes = learner_of(), episodes_for("mlp")
    torch.compiler.reset()
    compiled = torch.compile(learner, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = [compiled(episodes).losses for _ in range(3)]
    torch.compiler.reset()
    assert torch.equal(losses[0], losses[2]) and torch.equal(losses[0], learner(episodes).losses)
