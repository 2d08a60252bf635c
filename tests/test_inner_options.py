"""Options of the inner loop on every backend: which parameters adapt, multi-step losses, batches of the support."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import metafast as mf
from tests.backends import one_launch
from tests.nets import build, episodes_for, gradient, relative_error

pytestmark = pytest.mark.usefixtures("backend")
BAR = 1e-10
# The parameters that adapt, by net: the last layer's, and all but.
HEADS = {"conv4": ["head"], "mlp": ["4"], "layer_norm": ["0", "1.weight"], "residual": ["head", "norm"]}
OPTIONS = [o for o in itertools.product((False, True), (None, (0.3, 0.0, 1.7)), (None, 2)) if o != (False, None, None)]


def options_of(name: str, partial: bool, query_weights: tuple[float, ...] | None, batch: int | None) -> dict:
    return {
        "adapts": HEADS[name] if partial else None,
        "query_weights": query_weights,
        "support_batch": batch,
    }


def six_samples(name: str) -> mf.Episodes:
    """Of a support set that batches of two divide."""
    e = episodes_for(name)
    x, y = torch.cat([e.support_x, e.query_x], 1), torch.cat([e.support_y, e.query_y], 1)
    return mf.Episodes(x[:, :6].contiguous(), y[:, :6].contiguous(), e.query_x, e.query_y)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", HEADS)
def test_meta_gradients(name: str, option: tuple, first_order: bool) -> None:
    model, episodes = build(name), six_samples(name)
    options = options_of(name, *option)
    weights = torch.rand(episodes.tasks, dtype=torch.float64)
    maml = mf.MAML(model, lr=0.1, steps=3, first_order=first_order, **options)
    maml(episodes, weights).loss.backward()
    by_autograd = gradient(model)
    model.zero_grad()
    out = maml.accumulate_grad(episodes, weights)
    by_hand = gradient(model)
    model.zero_grad()
    wanted = mf.reference.maml(model, episodes, lr=0.1, steps=3, first_order=first_order, weights=weights, **options)
    wanted.loss.backward()
    assert relative_error(out.losses, wanted.losses) < BAR
    assert relative_error(out.logits, wanted.logits) < BAR
    for found in (by_autograd, by_hand):
        assert relative_error(found, gradient(model)) < BAR


@pytest.mark.parametrize("rates", ["parameter", "layer and step"])
@pytest.mark.parametrize("option", [(None, None), ((0.5, 0.25, 1.0), None), (None, 2), ((0.0, 1.0, -1.0), 2)])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", ["conv4", "mlp"])
def test_learned_rates(name: str, first_order: bool, option: tuple, rates: str) -> None:
    """The rates' gradients, against those that another path through the same rule gives."""

    class Same(mf.LearnedRates if rates == "parameter" else mf.LayerRates):
        """A subclass could step otherwise, so it goes by the generic adjoint."""

    model, episodes = build(name), six_samples(name)
    query_weights, batch = option
    found: list[Tensor] = []
    for kind in (Same, Same.__mro__[1]):
        rule = kind(model, 0.1) if rates == "parameter" else kind(model, 3, 0.1)
        with torch.no_grad():
            rule.rates += 0.05 * torch.sin(torch.arange(rule.rates.numel())).view_as(rule.rates)
        learner = mf.GradientLearner(
            model, rule, steps=3, first_order=first_order, query_weights=query_weights, support_batch=batch
        )
        for accumulate in (False, True):
            learner.zero_grad()
            if accumulate:
                learner.accumulate_grad(episodes)
            else:
                out = learner(episodes)
                (out.loss + 0.1 * (out.losses * out.losses).sum() + 0.2 * out.logits.square().mean()).backward()
            found.append(gradient(learner))
    assert found[0].abs().sum() > 0 and found[1].abs().sum() > 0
    assert relative_error(found[2], found[0]) < BAR
    assert relative_error(found[3], found[1]) < BAR


def test_rates_alone_are_learned_where_the_model_is_fixed() -> None:
    model, episodes = build("mlp"), six_samples("mlp")
    rule = mf.LearnedRates(model, 0.1)
    learner = mf.GradientLearner(model, rule, steps=2, learn_init=False)
    learner.accumulate_grad(episodes)
    whole = mf.GradientLearner(model, rule, steps=2)
    by_rule = rule.rates.grad.clone()
    assert all(p.grad is None for p in model.parameters())
    rule.rates.grad = None
    whole.accumulate_grad(episodes)
    assert relative_error(by_rule, rule.rates.grad) < BAR


def test_query_weights_may_change() -> None:
    model, episodes = build("mlp"), six_samples("mlp")
    maml = mf.MAML(model, lr=0.1, steps=2, query_weights=(1.0, 0.0))
    first = maml(episodes).loss
    maml.query_weights = (0.0, 1.0)
    assert maml(episodes).loss != first
    # On a GPU the plain learner's is another kernel, of other roundings, where it may be.
    with one_launch(False) if mf.current_backend() == "simt" else nullcontext():
        assert torch.equal(maml(episodes).losses, mf.MAML(model, lr=0.1, steps=2)(episodes).losses)


def test_adapt_steps_through_the_batches() -> None:
    model, episodes = build("mlp"), six_samples("mlp")
    maml = mf.MAML(model, lr=0.1, steps=3, support_batch=2)
    adapted = maml.adapt(episodes.support_x, episodes.support_y)(episodes.query_x)
    assert relative_error(adapted, maml(episodes).logits) < BAR


@pytest.mark.parametrize("rates", ["parameter", "layer and step"])
def test_rates_get_their_gradient_under_no_grad(rates: str) -> None:
    model, episodes = build("mlp"), six_samples("mlp")
    rule = mf.LearnedRates(model, 0.1) if rates == "parameter" else mf.LayerRates(model, 2, 0.1)
    learner = mf.GradientLearner(model, rule, steps=2)
    learner.accumulate_grad(episodes)
    wanted = gradient(learner)
    learner.zero_grad()
    with torch.no_grad():
        learner.accumulate_grad(episodes)
    assert torch.equal(gradient(learner), wanted)


@pytest.mark.parametrize("whole", [True, False])
def test_parameters_that_adapt_in_another_dtype(whole: bool) -> None:
    model, episodes = build("mlp").float(), six_samples("mlp")
    maml = mf.MAML(model, lr=0.1, steps=3, adapts=["4"])
    (maml if whole else model).double()
    wanted = mf.reference.maml(model, episodes, lr=0.1, steps=3, adapts=["4"])
    assert relative_error(maml(episodes).losses, wanted.losses) < BAR


def test_rates_changed_in_place_before_the_backward_are_refused() -> None:
    model, episodes = build("mlp"), six_samples("mlp")
    rule = mf.LearnedRates(model, 0.1)
    for learned in (True, False):
        rule.rates.requires_grad_(learned)
        out = mf.GradientLearner(model, rule, steps=2)(episodes)
        with torch.no_grad():
            rule.rates.mul_(5)
        if mf.current_backend() == "cpu" or learned:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.logits.square().sum().backward()


@pytest.mark.not_lowered
@pytest.mark.filterwarnings("ignore:metafast. Sequential runs by")
def test_a_multi_step_loss_goes_along_one_path_of_dropout() -> None:
    """The same masks lead to phi_1 and from there to phi_2: losses add up."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 11), torch.nn.Dropout(0.5), torch.nn.Linear(11, 3)).double()
    episodes, losses = six_samples("mlp"), []
    for query_weights in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        maml = mf.MAML(model, lr=0.1, steps=2, query_weights=query_weights)
        torch.manual_seed(0)
        losses.append(maml(episodes).losses.detach())
    assert relative_error(losses[0] + losses[1], losses[2]) < BAR
    assert relative_error(losses[0], losses[1]) > 1e-3


def test_the_number_of_steps_set_anew() -> None:
    maml = mf.MAML(build("mlp"), steps=2, query_weights=(1.0, 2.0))
    maml.steps = 3
    for call in (maml, maml.accumulate_grad):
        with pytest.raises(ValueError, match="^query_weights: expected 3 numbers"):
            call(six_samples("mlp"))


@pytest.mark.parametrize(
    ("error", "name", "options"),
    [
        (TypeError, "adapts", {"adapts": "4"}),
        (TypeError, "adapts", {"adapts": []}),
        (ValueError, "adapts", {"adapts": ["4", "head"]}),
        (TypeError, "adapts", {"adapts": [4]}),
        (TypeError, "query_weights", {"query_weights": 0.5}),
        (ValueError, "query_weights", {"query_weights": (1.0,)}),
        (ValueError, "query_weights", {"query_weights": (1.0, float("nan"))}),
        (ValueError, "support_batch", {"support_batch": 0}),
    ],
)
def test_arguments(error: type[Exception], name: str, options: dict) -> None:
    with pytest.raises(error, match=f"^{name}: expected"):
        mf.MAML(build("mlp"), steps=2, **options)


def test_batches_that_do_not_divide_the_support() -> None:
    maml, episodes = mf.MAML(build("mlp"), steps=2, support_batch=4), six_samples("mlp")
    for call in (maml, maml.accumulate_grad, lambda e: maml.adapt(e.support_x, e.support_y)):
        with pytest.raises(ValueError, match="^support_batch: expected a divisor of the 6 samples"):
            call(episodes)
    assert all(p.grad is None for p in maml.parameters())


@pytest.mark.not_lowered
def test_a_shared_parameter_adapts_by_its_first_name() -> None:
    with pytest.raises(ValueError, match=r"^adapts: '2\.weight' is the parameter '0\.weight' too"):
        mf.MAML(build("tied"), adapts=["2"])
    rule = mf.MAML(build("tied"), adapts=["0", "2"]).rule
    assert isinstance(rule, mf.PartialSGD)
    assert int(rule.moves.sum()) == 36 + 6 + 6
