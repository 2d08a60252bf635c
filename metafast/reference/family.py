"""MAML's family as loops over tasks with autograd through all of it: Reptile, CAVIA, ProtoMAML, MAML++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metafast.engine.batch_norm import check_policy, policy
from metafast.episodes import Episodes, Outcome, check_dense, outcome
from metafast.losses import LossSpec, resolve_loss
from metafast.reference.learners import Gradient, Parameters, descend, moves, over_tasks


def reptile(
    model: nn.Module,
    episodes: Episodes,
    *,
    lr: float,
    steps: int,
    loss: LossSpec = "cross_entropy",
    weights: Tensor | None = None,
    batch_norm: str = "batch",
    support_batch: int | None = None,
) -> tuple[Outcome, Parameters]:
    """Reptile (Nichol et al. 2018): the outcome, and the meta-gradient sum_t w_t (theta - phi_K) by name."""
    ends: list[Parameters] = []

    def adapt(params: Parameters, gradient: Gradient) -> list[Parameters]:
        for k in range(steps):
            grads = gradient(params, k)
            params = {name: (value - lr * grads[name]).detach().requires_grad_() for name, value in params.items()}
        ends.append(params)
        return [params]

    out = over_tasks(model, episodes, adapt, resolve_loss(loss), True, weights, batch_norm, None, support_batch)
    shares = [1 / episodes.tasks] * episodes.tasks if weights is None else weights.tolist()
    theta = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    towards = {
        name: torch.stack([w * (value - end[name].detach()) for w, end in zip(shares, ends)]).sum(0)
        for name, value in theta.items()
    }
    return out.detach(), towards


def cavia(
    model: nn.Module,
    episodes: Episodes,
    *,
    context: Sequence[str],
    lr: float,
    steps: int,
    loss: LossSpec = "cross_entropy",
    first_order: bool = False,
    weights: Tensor | None = None,
    batch_norm: str = "batch",
    query_weights: Sequence[float] | None = None,
    support_batch: int | None = None,
) -> Outcome:
    """CAVIA (Zintgraf et al. 2019); ``context``: names of the context parameters or their modules."""

    def adapt(params: Parameters, gradient: Gradient) -> list[Parameters]:
        params = {
            name: torch.zeros_like(value, requires_grad=True) if moves(name, context) else value
            for name, value in params.items()
        }
        return descend(params, gradient, lr, steps, context)

    return over_tasks(
        model, episodes, adapt, resolve_loss(loss), first_order, weights, batch_norm, query_weights, support_batch
    )


def mamlpp(
    model: nn.Module,
    episodes: Episodes,
    *,
    rates: Sequence[Parameters],
    norms: Sequence[Parameters],
    loss: LossSpec = "cross_entropy",
    first_order: bool = False,
    weights: Tensor | None = None,
    query_weights: Sequence[float] | None = None,
) -> Outcome:
    """MAML++ (Antoniou et al. 2019): by step and name, learned rates and what norms' parameters become instead."""

    def adapt(params: Parameters, gradient: Gradient) -> list[Parameters]:
        path = [params]
        for k, (alpha, values) in enumerate(zip(rates, norms)):
            grads = gradient(params, k)
            params = {name: values.get(name, value - alpha[name] * grads[name]) for name, value in params.items()}
            path.append(params)
        return path

    return over_tasks(model, episodes, adapt, resolve_loss(loss), first_order, weights, "batch", query_weights)


def protomaml(
    encoder: nn.Module,
    episodes: Episodes,
    *,
    ways: int,
    lr: float,
    steps: int,
    first_order: bool = False,
    weights: Tensor | None = None,
    batch_norm: str = "batch",
) -> Outcome:
    """Proto-MAML (Triantafillou et al. 2020); the gradient flows through the head's start."""
    check_dense(episodes, "the reference")
    check_policy(batch_norm, encoder)
    losses, logits = [], []
    with policy(encoder, batch_norm):
        for xs, ys, xq, yq in zip(episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y):
            # Copies: the inner gradient by phi must not see that the head came from theta.
            params: Parameters = {name: p.clone() for name, p in encoder.named_parameters() if p.requires_grad}
            embedded = encoder(xs).flatten(1)
            means = torch.stack([embedded[ys == c].mean(0) for c in range(ways)])
            head = [2 * means, -(means**2).sum(1)]
            for _ in range(steps):
                value = F.cross_entropy(F.linear(functional_call(encoder, params, (xs,)).flatten(1), *head), ys)
                both = [*params.values(), *head]
                grads = torch.autograd.grad(value, both, create_graph=not first_order, allow_unused=True)
                stepped = [p if g is None else p - lr * g for p, g in zip(both, grads)]
                params, head = dict(zip(params, stepped)), stepped[-2:]
            logits.append(F.linear(functional_call(encoder, params, (xq,)).flatten(1), *head))
            losses.append(F.cross_entropy(logits[-1], yq))
    return outcome(torch.stack(losses), torch.stack(logits), episodes.query_y, weights)
