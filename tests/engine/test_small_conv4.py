"""A Conv4 of few channels by every learner, on the emulated kernels too, which a larger one takes many seconds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from tests.backends import in_order, on_cpu_and_simt, poisoned
from tests.nets import gradient, relative_error

BAR = 1e-10
WAYS = 3
Reference = Callable[[], mf.Outcome]


def conv4(width: int = 3) -> mf.models.Conv4:
    """Its norms are moved off 1 and 0."""
    torch.manual_seed(0)
    model = mf.models.Conv4(WAYS, width, in_channels=1, image_size=16).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def episodes(tasks: int = 2) -> mf.Episodes:
    generator = torch.Generator().manual_seed(1)

    def side(samples: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(tasks, samples, 1, 16, 16, dtype=torch.float64, generator=generator)
        return x, torch.arange(samples).remainder(WAYS).repeat(tasks, 1)

    return mf.Episodes(*side(4), *side(3))


def optimizer() -> mf.LSTMOptimizer:
    torch.manual_seed(0)
    return mf.LSTMOptimizer(3, 2, learn_state=True).double()


def learner_of(kind: str) -> tuple[nn.Module, Reference]:
    """A learner, and what the plain loop makes of its parameters."""
    model, e, ref = conv4(), episodes(), mf.reference
    options = {"lr": 0.2, "steps": 2}
    if kind in ("MAML", "FOMAML"):
        first_order = kind == "FOMAML"
        maml = mf.MAML(model, first_order=first_order, **options)
        return maml, lambda: ref.maml(model, e, first_order=first_order, **options)
    if kind in ("LOMAML", "first-order LOMAML"):
        rule, first_order = optimizer(), kind != "LOMAML"
        lomaml = mf.LOMAML(model, rule, first_order=first_order, **options)
        return lomaml, lambda: ref.lomaml(model, rule, e, first_order=first_order, **options)
    if kind == "ANIL":
        anil = {"adapts": ["head"], "query_weights": (0.4, 0.6), **options}
        return mf.MAML(model, **anil), lambda: ref.maml(model, e, **anil)
    if kind == "BOIL, a part of the support each":
        names = [name for name, _ in model.named_parameters() if not name.startswith("head")]
        boil = {"adapts": names, "support_batch": 2, **options}
        return mf.MAML(model, **boil), lambda: ref.maml(model, e, **boil)
    metric = kind.partition(" ")[2]
    encoder = nn.Sequential(*list(model.children())[:-1])
    return mf.ProtoNets(encoder, metric), lambda: ref.protonets(encoder, e, metric=metric)


KINDS = ["MAML", "FOMAML", "LOMAML", "first-order LOMAML", "ANIL", "BOIL, a part of the support each"]
KINDS += [f"ProtoNets {metric}" for metric in ("sqeuclidean", "euclidean", "cosine")]


@on_cpu_and_simt
@pytest.mark.parametrize("kind", KINDS)
def test_both_doors_in_two_orders(kind: str, backend: str) -> None:
    """The same bits by autograd and without it, the latter with another order of threads and blocks."""
    learner, reference = learner_of(kind)
    e = episodes()
    with mf.use_backend(backend), poisoned():
        with in_order(backend, 3):
            direct = learner.accumulate_grad(e)
        found = [direct.losses, direct.logits, gradient(learner)]
        learner.zero_grad()
        out = learner(e)
        out.loss.backward()
    for one, other in zip(found, (out.losses, out.logits, gradient(learner)), strict=True):
        assert torch.equal(one, other.detach())
    learner.zero_grad()
    wanted = reference()
    wanted.loss.backward()
    for one, other in zip(found, (wanted.losses, wanted.logits, gradient(learner)), strict=True):
        assert relative_error(one, other) <= BAR
    assert torch.equal(out.accuracy, wanted.accuracy)
