"""MAML, FOMAML, LOMAML and ProtoNets as loops over tasks with ``torch.autograd.grad(create_graph=True)``.

The oracle: one task at a time, a plain forward, the derivative by autograd through all of it, in any dtype. Nothing
here is shared with the engines but :class:`~metafast.Episodes`, the losses and the batch-norm policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metafast.coordinatewise import CoordinatewiseOptimizer
from metafast.engine.batch_norm import check_policy, policy
from metafast.episodes import Episodes, Outcome, check_dense, outcome
from metafast.losses import Loss, LossSpec, resolve_loss
from metafast.lstm import LSTMOptimizer
from metafast.mlp_optimizer import MLPOptimizer
from metafast.reference.lstm import lstm_step, mlp_step

Parameters = dict[str, Tensor]
Gradient = Callable[[Parameters, int], Parameters]  # of the support loss that step k sees


def maml(
    model: nn.Module,
    episodes: Episodes,
    *,
    lr: float,
    steps: int,
    loss: LossSpec = "cross_entropy",
    first_order: bool = False,
    weights: Tensor | None = None,
    batch_norm: str = "batch",
    adapts: Sequence[str] | None = None,
    query_weights: Sequence[float] | None = None,
    support_batch: int | None = None,
) -> Outcome:
    """MAML and, with ``first_order``, FOMAML (Finn et al. 2017); arguments as :class:`metafast.MAML`.

    Example:
        >>> import metafast as mf
        >>> model, episodes = mf.models.MLP(1, (8,), 1), mf.data.Sinusoid().sample(tasks=2, shots=5, queries=5)
        >>> maml(model, episodes, lr=0.01, steps=2, loss="mse").loss.backward()
    """

    def adapt(params: Parameters, gradient: Gradient) -> list[Parameters]:
        return descend(params, gradient, lr, steps, adapts)

    return over_tasks(
        model, episodes, adapt, resolve_loss(loss), first_order, weights, batch_norm, query_weights, support_batch
    )


def descend(
    params: Parameters, gradient: Gradient, lr: float, steps: int, adapts: Sequence[str] | None
) -> list[Parameters]:
    """phi_0..phi_K of steps phi - lr g, of those parameters that adapt."""
    path = [params]
    for k in range(steps):
        grads = gradient(params, k)
        params = {name: value - lr * grads[name] if moves(name, adapts) else value for name, value in params.items()}
        path.append(params)
    return path


def lomaml(
    model: nn.Module,
    optimizer: CoordinatewiseOptimizer,
    episodes: Episodes,
    *,
    lr: float,
    steps: int,
    loss: LossSpec = "cross_entropy",
    first_order: bool = False,
    learn_init: bool = True,
    weights: Tensor | None = None,
    batch_norm: str = "batch",
    adapts: Sequence[str] | None = None,
    query_weights: Sequence[float] | None = None,
    support_batch: int | None = None,
    truncate: int | None = None,
) -> Outcome:
    """LOMAML: MAML's loop with the learned optimiser's output for the gradient; arguments as in LOMAML itself."""
    initial, step = _plain_optimizer(optimizer)

    def adapt(params: Parameters, gradient: Gradient) -> list[Parameters]:
        if not learn_init:
            params = {name: value.detach().requires_grad_() for name, value in params.items()}
        states = {name: initial(value.numel()) for name, value in params.items()}
        path = [params]
        for k in range(steps):
            if truncate is not None and k > 0 and k % truncate == 0:
                params = {name: value.detach().requires_grad_() for name, value in params.items()}
                states = {name: state.detach() for name, state in states.items()}
            grads = gradient(params, k)
            stepped = dict(params)
            for name, value in params.items():
                if moves(name, adapts):
                    update, states[name] = step(grads[name].reshape(-1), states[name])
                    stepped[name] = value - lr * update.reshape(value.shape)
            params = stepped
            path.append(params)
        return path

    return over_tasks(
        model, episodes, adapt, resolve_loss(loss), first_order, weights, batch_norm, query_weights, support_batch
    )


def moves(name: str, adapts: Sequence[str] | None) -> bool:
    return adapts is None or any(name == a or name.startswith(f"{a}.") for a in adapts)


def _plain_optimizer(
    optimizer: CoordinatewiseOptimizer,
) -> tuple[Callable[[int], Tensor], Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """The state before the first step, and the step, by plain formulas."""
    if isinstance(optimizer, LSTMOptimizer):
        lstm, start = optimizer, optimizer.initial_state
        psi = list(lstm.weights)

        def initial(coordinates: int) -> Tensor:
            if start is None:
                return torch.zeros(lstm.layers, 2, coordinates, lstm.hidden, dtype=psi[0].dtype, device=psi[0].device)
            return torch.stack([start] * coordinates, dim=2)

        return initial, lambda grads, state: lstm_step(grads, state, psi, lstm.p)
    if isinstance(optimizer, MLPOptimizer):
        mlp = optimizer
        layers = [(part.weight, part.bias) for part in (*mlp.net, mlp.output) if isinstance(part, nn.Linear)]
        return mlp.init, lambda grads, state: mlp_step(grads, state, layers, mlp.momenta, mlp.p)
    return optimizer.init, optimizer


def protonets(
    encoder: nn.Module,
    episodes: Episodes,
    *,
    metric: str = "sqeuclidean",
    weights: Tensor | None = None,
    batch_norm: str = "batch",
) -> Outcome:
    """Prototypical Networks (Snell et al. 2017); arguments as :class:`metafast.ProtoNets`."""
    check_dense(episodes, "the reference")
    check_policy(batch_norm, encoder)
    losses, logits = [], []
    with policy(encoder, batch_norm):
        for t in range(episodes.tasks):
            shots = episodes.support_x.shape[1]
            embedded = encoder(torch.cat([episodes.support_x[t], episodes.query_x[t]])).flatten(1)
            support, query = embedded[:shots], embedded[shots:]
            labels = episodes.support_y[t]
            means = torch.stack([support[labels == c].mean(0) for c in range(int(episodes.support_y.max()) + 1)])
            if metric == "cosine":
                scores = F.cosine_similarity(query.unsqueeze(1), means.unsqueeze(0), dim=-1)
            else:
                scores = -((query.unsqueeze(1) - means.unsqueeze(0)) ** 2).sum(-1)
                if metric == "euclidean":
                    scores = -(-scores).sqrt()
            logits.append(scores)
            losses.append(F.cross_entropy(scores, episodes.query_y[t]))
    return outcome(torch.stack(losses), torch.stack(logits), episodes.query_y, weights)


def over_tasks(
    model: nn.Module,
    episodes: Episodes,
    adapt: Callable[[Parameters, Gradient], list[Parameters]],
    loss: Loss,
    first_order: bool,
    weights: Tensor | None,
    batch_norm: str,
    query_weights: Sequence[float] | None = None,
    support_batch: int | None = None,
) -> Outcome:
    """Adapt to each task in turn and judge on its queries; differentiable by autograd's own graph.

    ``adapt`` gives phi_0..phi_K.
    """
    check_dense(episodes, "the reference")
    check_policy(batch_norm, model)
    theta: Parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses, logits = [], []
    with policy(model, batch_norm):
        for t in range(episodes.tasks):

            def gradient(params: Parameters, k: int, t: int = t) -> Parameters:
                x, y = episodes.support_x[t], episodes.support_y[t]
                if support_batch is not None:
                    first = k * support_batch % x.shape[0]
                    x, y = x[first : first + support_batch], y[first : first + support_batch]
                value = loss.function(functional_call(model, params, (x,)), y)
                grads = torch.autograd.grad(
                    value, list(params.values()), create_graph=not first_order, allow_unused=True
                )
                return {name: torch.zeros_like(params[name]) if g is None else g for name, g in zip(params, grads)}

            path = adapt(theta, gradient)
            judged = [1.0] if query_weights is None else query_weights  # from the last step backwards
            for v, params in zip(reversed(judged), reversed(path)):
                outputs = functional_call(model, params, (episodes.query_x[t],))
                part = v * loss.function(outputs, episodes.query_y[t])
                if params is path[-1]:
                    logits.append(outputs)
                    losses.append(part)
                else:
                    losses[-1] = losses[-1] + part
    return outcome(torch.stack(losses), torch.stack(logits), episodes.query_y, weights)
