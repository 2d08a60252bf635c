"""Cases for the learners: outcome and meta-gradient, by both doors, against ``metafast.reference``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from metafast import reference
from metafast.checks.compare import Case, Inputs, Quantities, flat_gradient
from metafast.checks.nets import INPUT_SHAPES, NETS, SMOOTH_NETS, WAYS
from metafast.checks.operators import seeded
from metafast.episodes import Episodes, Outcome
from metafast.learners import LOMAML, MAML, GradientLearner, ProtoNets
from metafast.lstm import LSTMOptimizer
from metafast.rules import LearnedRates

_TASKS, _SHOTS, _QUERIES = 3, 3, 4
_LR = 0.1


def learner_cases(quick: bool) -> Iterator[Case]:
    """Every learner on every net, in float64 with kinks and in float32 smooth; ``quick`` leaves out 5 steps."""
    for nets, dtype, draws in ((NETS, torch.float64, 1), (SMOOTH_NETS, torch.float32, 3)):
        for name, net in nets.items():
            inputs = tuple(partial(_inputs, name, net, seed) for seed in range(draws))
            for steps in (1,) if quick else (1, 5):
                text = f"{name}, {steps} step{'s' * (steps > 1)}"
                for first_order in (False, True):
                    yield _maml_case(text, inputs, steps, first_order, dtype)
                yield _lomaml_case(text, inputs, steps, dtype)
            text = f"{name}, 2 steps"
            yield _anil_case(text, inputs, dtype)
            yield _metasgd_case(text, inputs, dtype)
            for metric in ("sqeuclidean", "euclidean", "cosine"):
                yield _protonets_case(f"{name}, {metric}", inputs, metric, dtype)


def _inputs(name: str, net: Callable[[], nn.Module], seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(100 + seed)

    def side(samples: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(WAYS).repeat_interleave(samples).repeat(_TASKS, 1)
        x = torch.randn(_TASKS, WAYS * samples, *INPUT_SHAPES[name], dtype=torch.float64, generator=generator)
        return x, y

    return {
        "model": seeded(net, seed),
        "optimizer": seeded(LSTMOptimizer, seed),
        "episodes": Episodes(*side(_SHOTS), *side(_QUERIES)),
        # No mean: a weight that is forgotten must show.
        "weights": torch.linspace(0.2, 0.7, _TASKS, dtype=torch.float64),
    }


def _unpack(inputs: Inputs) -> tuple[nn.Module, LSTMOptimizer, Episodes, Tensor]:
    return (
        cast(nn.Module, inputs["model"]),
        cast(LSTMOptimizer, inputs["optimizer"]),
        cast(Episodes, inputs["episodes"]),
        cast(Tensor, inputs["weights"]),
    )


def _maml_case(
    text: str, inputs: tuple[Callable[[], Inputs], ...], steps: int, first_order: bool, dtype: torch.dtype
) -> Case:
    def ours(inputs: Inputs) -> Quantities:
        model, _, episodes, weights = _unpack(inputs)
        learner = MAML(model, lr=_LR, steps=steps, first_order=first_order)
        return _by_both_doors(learner, episodes, weights)

    def plain(inputs: Inputs) -> Quantities:
        model, _, episodes, weights = _unpack(inputs)
        out = reference.maml(model, episodes, lr=_LR, steps=steps, first_order=first_order, weights=weights)
        return _plain_quantities(out, model)

    return Case("FOMAML" if first_order else "MAML", text, inputs, ours, plain, (dtype,))


def _anil_case(text: str, inputs: tuple[Callable[[], Inputs], ...], dtype: torch.dtype) -> Case:
    """The last layer alone adapts, by a part of the support set each step, and all query losses count."""
    some: dict[str, Any] = {"lr": _LR, "steps": 2, "support_batch": 3, "query_weights": (0.4, 0.6)}

    def head(model: nn.Module) -> list[str]:
        return [[name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]]

    def ours(inputs: Inputs) -> Quantities:
        model, _, episodes, weights = _unpack(inputs)
        return _by_both_doors(MAML(model, adapts=head(model), **some), episodes, weights)

    def plain(inputs: Inputs) -> Quantities:
        model, _, episodes, weights = _unpack(inputs)
        out = reference.maml(model, episodes, adapts=head(model), weights=weights, **some)
        return _plain_quantities(out, model)

    return Case("ANIL", text, inputs, ours, plain, (dtype,))


def _metasgd_case(text: str, inputs: tuple[Callable[[], Inputs], ...], dtype: torch.dtype) -> Case:
    def rule(model: nn.Module) -> LearnedRates:
        rates = LearnedRates(model, _LR)
        with torch.no_grad():
            rates.rates.mul_(torch.linspace(0.5, 1.5, rates.rates.numel()).to(rates.rates))
        return rates

    def ours(inputs: Inputs) -> Quantities:
        model, _, episodes, weights = _unpack(inputs)
        return _by_both_doors(GradientLearner(model, rule(model), steps=2), episodes, weights)

    def plain(inputs: Inputs) -> Quantities:
        model, _, episodes, weights = _unpack(inputs)
        rates, named = rule(model), dict(model.named_parameters())
        parts = rates.rates.split([p.numel() for p in named.values()])
        each = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts)}
        out = reference.mamlpp(model, episodes, rates=[each] * 2, norms=[{}] * 2, weights=weights)
        return _plain_quantities(out, model, rates)

    return Case("MetaSGD", text, inputs, ours, plain, (dtype,))


def _lomaml_case(text: str, inputs: tuple[Callable[[], Inputs], ...], steps: int, dtype: torch.dtype) -> Case:
    def ours(inputs: Inputs) -> Quantities:
        model, optimizer, episodes, weights = _unpack(inputs)
        return _by_both_doors(LOMAML(model, optimizer, lr=_LR, steps=steps), episodes, weights)

    def plain(inputs: Inputs) -> Quantities:
        model, optimizer, episodes, weights = _unpack(inputs)
        out = reference.lomaml(model, optimizer, episodes, lr=_LR, steps=steps, weights=weights)
        return _plain_quantities(out, model, optimizer)

    return Case("LOMAML", text, inputs, ours, plain, (dtype,))


def _protonets_case(text: str, inputs: tuple[Callable[[], Inputs], ...], metric: str, dtype: torch.dtype) -> Case:
    def ours(inputs: Inputs) -> Quantities:
        model, _, episodes, weights = _unpack(inputs)
        return _by_both_doors(ProtoNets(model, metric=metric), episodes, weights)

    def plain(inputs: Inputs) -> Quantities:
        model, _, episodes, weights = _unpack(inputs)
        return _plain_quantities(reference.protonets(model, episodes, metric=metric, weights=weights), model)

    return Case("ProtoNets", text, inputs, ours, plain, (dtype,))


def _by_both_doors(learner: nn.Module, episodes: Episodes, weights: Tensor) -> Quantities:
    out: Outcome = learner(episodes, weights)
    out.loss.backward()
    backward = flat_gradient(learner.parameters())
    learner.zero_grad()
    again: Outcome = cast(Callable[..., Outcome], learner.accumulate_grad)(episodes, weights)
    return {
        "outcome": (out.loss, out.losses, out.logits, again.loss, again.losses, again.logits),
        "gradient": (backward, flat_gradient(learner.parameters())),
    }


def _plain_quantities(out: Outcome, *owners: nn.Module) -> Quantities:
    out.loss.backward()
    gradient = torch.cat([flat_gradient(owner.parameters()) for owner in owners])
    outcome = (out.loss, out.losses, out.logits)
    return {"outcome": (*outcome, *outcome), "gradient": (gradient, gradient)}
