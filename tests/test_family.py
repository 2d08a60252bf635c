"""The family of MAML on every backend: Reptile, CAVIA, ProtoMAML, ANIL and BOIL, MAML++, against plain loops."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from tests.nets import both_doors, build, episodes_for, gradient, relative_error
from tests.test_inner_options import six_samples
from tests.test_learners import Counting, DataDependent, WithDropout

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.emulated_in_part]
BAR = 1e-10
NETS = ["conv4", "mlp", "residual", "batch_norm", "partly_frozen", "tied"]


def task_weights(episodes: mf.Episodes) -> Tensor:
    return torch.rand(episodes.tasks, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_reptile(name: str, weighted: bool, batch: int | None) -> None:
    model, episodes = build(name), six_samples(name)
    weights = task_weights(episodes) if weighted else None
    out, found = both_doors(mf.Reptile(model, lr=0.1, steps=3, support_batch=batch), episodes, weights)
    wanted, towards = mf.reference.reptile(model, episodes, lr=0.1, steps=3, weights=weights, support_batch=batch)
    assert relative_error(out.loss, wanted.loss) <= BAR and relative_error(out.losses, wanted.losses) <= BAR
    assert relative_error(out.logits, wanted.logits) <= BAR
    assert relative_error(found, torch.cat([t.reshape(-1) for t in towards.values()])) <= BAR


def test_reptiles_outer_step_is_that_of_the_paper() -> None:
    model, episodes = build("mlp"), episodes_for("mlp")
    learner = mf.Reptile(model, lr=0.1, steps=2)
    ends = learner.adapt(episodes.support_x, episodes.support_y).parameters["0.weight"].mean(0)
    before = model[0].weight.detach().clone()
    outer = torch.optim.SGD(learner.parameters(), lr=0.3)
    learner.accumulate_grad(episodes)
    outer.step()
    assert relative_error(model[0].weight, before + 0.3 * (ends - before)) <= BAR


def test_no_step_is_no_gradient_for_reptile_and_evaluation_needs_no_graph() -> None:
    model, episodes = build("mlp"), episodes_for("mlp")
    _, found = both_doors(mf.Reptile(model, steps=0), episodes, None)
    assert not found.any()
    with torch.no_grad():
        assert not mf.Reptile(model, steps=2)(episodes).loss.requires_grad


class Conditioned(nn.Module):
    """Context as FiLM on images, its second use in the head's bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.film = nn.Conv2d(1, 4, 3), mf.models.ContextFiLM(3, 4)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.film(self.norm(self.conv(x)))).mean((2, 3))
        return self.head(h) + self.film.context


def contextual(name: str) -> tuple[nn.Module, mf.Episodes]:
    torch.manual_seed(0)
    if name == "film":
        model: nn.Module = Conditioned()
    elif name == "concat":
        model = nn.Sequential(mf.models.ContextConcat(4), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))
    else:  # a bias for a context, which the kernels take
        model = build("mlp")
    return model.double(), six_samples("conv4" if name == "film" else "mlp")


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Context layers have no kernels: auto runs them by torch, a forced backend would refuse."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*runs by torch, without native kernels")
        if name == "bias":
            yield
        else:
            with mf.use_backend("auto"):
                yield


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("option", [(None, None), ((0.3, 0.0, 1.7), 2)])
@pytest.mark.parametrize("kind", ["film", "concat", "bias"])
def test_cavia(kind: str, option: tuple, first_order: bool) -> None:
    model, episodes = contextual(kind)
    context = {"film": ["film.context"], "concat": ["0.context"], "bias": ["0.bias"]}[kind]
    query_weights, batch = option
    options = {"first_order": first_order, "query_weights": query_weights, "support_batch": batch}
    weights = task_weights(episodes)
    learner = mf.CAVIA(model, lr=0.3, steps=3, context=context if kind == "bias" else None, **options)
    with _quiet(kind):
        out, found = both_doors(learner, episodes, weights)
    wanted = mf.reference.cavia(model, episodes, context=context, lr=0.3, steps=3, weights=weights, **options)
    wanted.loss.backward()
    assert relative_error(out.losses, wanted.losses) <= BAR and relative_error(out.logits, wanted.logits) <= BAR
    assert relative_error(found, gradient(model)) <= BAR
    learner.zero_grad()
    with _quiet(kind):
        learner.accumulate_grad(episodes)
    assert not dict(model.named_parameters())[context[0]].grad.any()


def test_cavia_starts_from_zero_wherever_the_context_is() -> None:
    model, episodes = contextual("concat")
    learner = mf.CAVIA(model, lr=0.3, steps=2)
    with _quiet("concat"):
        first = learner(episodes).losses
        adapted = learner.adapt(episodes.support_x, episodes.support_y).parameters["0.context"]
        with torch.no_grad():
            model[0].context.fill_(7.0)
        assert torch.equal(learner(episodes).losses, first)
        assert torch.equal(learner.adapt(episodes.support_x, episodes.support_y).parameters["0.context"], adapted)
        by_hand = learner.clone()
        for _ in range(2):
            by_hand.adapt(nn.functional.cross_entropy(by_hand(episodes.support_x[0]), episodes.support_y[0]))
        assert relative_error(by_hand.parameters["0.context"], adapted[0]) <= BAR


def encoder_of(name: str) -> nn.Module:
    if name == "conv4":
        torch.manual_seed(0)
        encoder: nn.Module = mf.models.Conv4Encoder(5, 1, 16).double()
        with torch.no_grad():
            for p in encoder.parameters():
                p.add_(0.1 * torch.randn_like(p))
        return encoder
    if name == "images":  # (N, 2, 3, 3), which the learner flattens
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 2, 5, stride=4), nn.Tanh()).double()
    return build(name)


FEATURES = {"conv4": 5, "images": 18}


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", ["images", *NETS])
def test_protomaml(name: str, steps: int, first_order: bool) -> None:
    encoder, episodes = encoder_of(name), episodes_for("conv4" if name == "images" else name)
    weights, features = task_weights(episodes), FEATURES.get(name, 3)
    learner = mf.ProtoMAML(encoder, features, 3, lr=0.1, steps=steps, first_order=first_order)
    out, found = both_doors(learner, episodes, weights)
    wanted = mf.reference.protomaml(
        encoder, episodes, ways=3, lr=0.1, steps=steps, first_order=first_order, weights=weights
    )
    wanted.loss.backward()
    assert relative_error(out.losses, wanted.losses) <= BAR and relative_error(out.logits, wanted.logits) <= BAR
    assert relative_error(found, gradient(learner)) <= BAR
    assert not found[-3 * (features + 1) :].any()  # the head's own numbers, which nothing reads


def test_protomaml_without_a_step_classifies_as_protonets() -> None:
    encoder, episodes = encoder_of("mlp"), episodes_for("mlp")
    logits = mf.ProtoMAML(encoder, 3, 3, steps=0)(episodes).logits
    nearness = mf.ProtoNets(encoder)(episodes).logits
    assert relative_error(logits.log_softmax(-1), nearness.log_softmax(-1)) <= BAR


def test_protomaml_with_its_other_options_is_its_own_adjoint() -> None:
    """Numbers and gradient of a path of query losses and of batches: against differences of the objective."""
    encoder, episodes = encoder_of("layer_norm"), episodes_for("layer_norm", shots=2)
    options = {"query_weights": (0.3, 0.0, 1.7), "support_batch": 3}
    learner = mf.ProtoMAML(encoder, 3, 3, lr=0.1, steps=3, **options)
    _, found = both_doors(learner, episodes, None)
    direction = [torch.randn_like(p) for p in encoder.parameters()]
    slopes = []
    for sign in (1, -1):
        moved = copy.deepcopy(learner)
        with torch.no_grad():
            for p, d in zip(moved.model[0].parameters(), direction):
                p.add_(sign * 1e-5 * d)
        slopes.append(moved(episodes).loss.item())
    wanted = (slopes[0] - slopes[1]) / 2e-5
    assert abs(float(found[: -3 * 4] @ torch.cat([d.reshape(-1) for d in direction])) - wanted) <= 1e-7 * abs(wanted)


@pytest.mark.parametrize("name", ["mlp", "conv4"])
def test_protomaml_follows_its_module_to_another_dtype(name: str) -> None:
    learner = mf.ProtoMAML(encoder_of(name).float(), FEATURES.get(name, 3), 3, lr=0.1, steps=2)
    single = learner(episodes_for(name).to(dtype=torch.float32)).losses
    assert relative_error(single.double(), learner.double()(episodes_for(name)).losses) <= 1e-4


@pytest.mark.parametrize("name", ["mlp", "conv4"])
@pytest.mark.parametrize("boil", [False, True])
def test_anil_and_boil(name: str, boil: bool) -> None:
    """ANIL adapts the head alone, BOIL all but the head; as PartialSGD in the one engine."""
    model, episodes = build(name), episodes_for(name)
    head = "4" if name == "mlp" else "head"
    names = [n for n, _ in model.named_parameters() if n.startswith(f"{head}.") != boil]
    out, found = both_doors(mf.MAML(model, lr=0.1, steps=2, adapts=names), episodes, None)
    wanted = mf.reference.maml(model, episodes, lr=0.1, steps=2, adapts=names)
    wanted.loss.backward()
    assert relative_error(out.losses, wanted.losses) <= BAR and relative_error(found, gradient(model)) <= BAR


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", ["conv4", "batch_norm"])
def test_mamlpp(name: str, first_order: bool) -> None:
    """Rates by layer and step, the query loss after each step, and norms of each step, all learned."""
    model, episodes = build(name), episodes_for(name)
    rule = mf.StepNorms(mf.LayerRates(model, 3, 0.1), model, 3)
    with torch.no_grad():
        for p in rule.parameters():
            p.mul_(1 + 0.2 * torch.randn_like(p))
    learner = mf.GradientLearner(model, rule, steps=3, first_order=first_order, query_weights=(0.2, 0.3, 0.5))
    out, found = both_doors(learner, episodes, None)

    named = dict(model.named_parameters())
    norm = nn.modules.batchnorm._BatchNorm
    normed = {n for n in named if isinstance(model.get_submodule(n.rpartition(".")[0]), norm)}
    rates = [dict(zip(named, rule.rule.rates[k])) for k in range(3)]
    sizes = [p.numel() for n, p in named.items() if n in normed]
    norms = [dict(zip((n for n in named if n in normed), rule.values[k].split(sizes))) for k in range(3)]
    assert len(normed) >= 2 and rule.values.shape == (3, sum(sizes))
    wanted = mf.reference.mamlpp(
        model, episodes, rates=rates, norms=norms, first_order=first_order, query_weights=(0.2, 0.3, 0.5)
    )
    wanted.loss.backward()
    assert relative_error(out.losses, wanted.losses) <= BAR and relative_error(out.logits, wanted.logits) <= BAR
    assert relative_error(found, gradient(learner)) <= BAR


def test_step_norms_start_as_the_models_own() -> None:
    model, episodes = build("batch_norm"), episodes_for("batch_norm")
    rule = mf.StepNorms(mf.SGD(0.1), model, 2)
    assert torch.equal(rule.values[1], torch.cat([model[1].weight, model[1].bias]))
    adapted = mf.GradientLearner(model, rule, steps=2).adapt(episodes.support_x, episodes.support_y)
    assert torch.equal(adapted.parameters["1.bias"][0], model[1].bias)
    with pytest.raises(ValueError, match="^steps: this rule has values for 2 steps, got another"):
        mf.GradientLearner(model, rule, steps=3)(episodes)


def make(kind: str, model: nn.Module, features: int = 3) -> mf.GradientLearner:
    if kind == "reptile":
        return mf.Reptile(model, lr=0.1, steps=2)
    if kind == "cavia":
        return mf.CAVIA(model, lr=0.1, steps=2, context=[next(iter(dict(model.named_parameters())))])
    return mf.ProtoMAML(model, features, 3, lr=0.1, steps=2)


def plainly(kind: str, model: nn.Module, episodes: mf.Episodes) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of the model's parameters."""
    if kind == "reptile":
        out, towards = mf.reference.reptile(model, episodes, lr=0.1, steps=2)
        return out.losses, torch.cat([t.reshape(-1) for t in towards.values()])
    if kind == "cavia":
        context = [next(iter(dict(model.named_parameters())))]
        out = mf.reference.cavia(model, episodes, context=context, lr=0.1, steps=2)
    else:
        out = mf.reference.protomaml(model, episodes, ways=3, lr=0.1, steps=2)
    model.zero_grad()
    out.loss.backward()
    return out.losses, gradient(model)


every_kind = pytest.mark.parametrize("kind", ["reptile", "cavia", "protomaml"])


@every_kind
@pytest.mark.parametrize("net", [WithDropout, DataDependent, Counting])
@pytest.mark.not_lowered
def test_what_vmap_cannot_take(net: type[nn.Module], kind: str) -> None:
    torch.manual_seed(0)
    model = net().double()
    # One task, so that loop and reference draw the same dropout masks in the same order.
    episodes = episodes_for("mlp", tasks=1 if net is WithDropout else 3)
    learner = make(kind, model)
    with pytest.warns(UserWarning, match="runs by a loop over tasks"):
        learner(episodes)
    torch.manual_seed(5)
    out = learner(episodes)
    out.loss.backward()
    found = gradient(model)
    torch.manual_seed(5)
    losses, wanted = plainly(kind, model, episodes)
    assert relative_error(out.losses, losses) <= BAR and relative_error(found, wanted) <= BAR


@every_kind
@pytest.mark.parametrize("name", ["mlp", "batch_norm"])
def test_one_task_odd_strides_and_any_number_of_threads(name: str, kind: str, backend: str) -> None:
    model, whole = build(name), episodes_for(name, tasks=7, shots=1)
    wide = torch.randn(7, 3, 12, dtype=torch.float64)
    turned = whole.query_x.transpose(0, 1).contiguous().transpose(0, 1)
    strided = mf.Episodes(wide[..., ::2], whole.support_y, turned, whole.query_y)
    for episodes in (strided, strided[3]):
        learner = make(kind, model)
        out, found = both_doors(learner, episodes, None)
        losses, wanted = plainly(kind, model, episodes)
        assert relative_error(out.losses, losses) <= BAR
        assert relative_error(found[: len(wanted)], wanted) <= BAR
        if backend == "torch":
            continue  # whose own operations split sums by threads
        torch.set_num_threads(2)
        again, by_two = both_doors(learner, episodes, None)
        torch.set_num_threads(1)
        assert torch.equal(again.logits, out.logits) and torch.equal(by_two, found)


@every_kind
@pytest.mark.parametrize("name", ["mlp", "conv4"])
def test_float32_errs_at_most_twice_as_much_as_the_plain_loop(name: str, kind: str) -> None:
    model = encoder_of("conv4") if name == "conv4" and kind == "protomaml" else build(name)
    episodes, features = episodes_for(name), 5 if name == "conv4" else 3
    _, exact = plainly(kind, model, episodes)
    single, e32 = copy.deepcopy(model).float(), episodes.to(dtype=torch.float32)
    _, plain = plainly(kind, single, e32)
    _, found = both_doors(make(kind, single, features), e32, None)
    bar = 2 * relative_error(plain.double(), exact) + 1e-6
    assert relative_error(found[: len(exact)].double(), exact) <= bar


def test_bad_input() -> None:
    model, episodes = build("mlp"), episodes_for("mlp")
    with pytest.raises(ValueError, match="^query_weights: queries teach Reptile nothing"):
        mf.Reptile(model).query_weights = (1.0,) * 5
    with pytest.raises(TypeError, match="^Reptile: a clone's loss has no Reptile gradient"):
        mf.Reptile(model).clone()
    with pytest.raises(TypeError, match="^ProtoMAML: a clone has no support set"):
        mf.ProtoMAML(model, 3, 3).clone()
    with pytest.raises(ValueError, match="^model: expected parameters named 'context', .*, got 0.weight, "):
        mf.CAVIA(model)
    with pytest.raises(ValueError, match="^context: expected to leave parameters to be shared, got all"):
        mf.CAVIA(model, context=["0", "2", "4"])
    with pytest.raises(ValueError, match="^ways: expected an int of at least 2, got 1"):
        mf.ProtoMAML(model, 3, 1)
    with pytest.raises(TypeError, match="^encoder: expected a torch.nn.Module, got 3"):
        mf.ProtoMAML(3, 3, 3)
    with pytest.raises(ValueError, match="^support_x: the model .* does not take samples"):
        mf.ProtoMAML(model, 4, 3)(episodes)
    with pytest.raises(ValueError, match="^support_y: every class 0..3 needs support, task 0 has none of 3"):
        mf.ProtoMAML(model, 3, 4)(episodes)
    with pytest.raises(ValueError, match="^support_y: expected labels below 2"):
        mf.ProtoMAML(model, 3, 2)(episodes)
    with pytest.raises(ValueError, match="^model: expected batch norms with parameters"):
        mf.StepNorms(mf.SGD(0.1), model, 2)
    with pytest.raises(TypeError, match="^rule: expected a metafast.UpdateRule, got 0.1"):
        mf.StepNorms(0.1, build("batch_norm"), 2)
    with pytest.raises(ValueError, match="^size: expected an int of at least 1, got 0"):
        mf.models.ContextConcat(0)
