"""The native engine's four results against plain autograd: outputs, pullback, gradient and Hessian-vector product."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

import metafast as mf
from metafast.engine.lowering import Lowered

NAMES = ("outputs", "pullback", "gradient", "hvp")


def native(
    model: nn.Module, e: mf.Episodes, loss: str, seed: int = 0, backend: str = "cpu"
) -> tuple[dict[str, Tensor], Lowered]:
    """The four by a backend's kernels, at parameters and along directions drawn by a seed, and what was lowered."""
    learner = mf.MAML(model, loss=loss)
    with mf.use_backend(backend):
        engine = learner._engines(e.support_x, e.support_y)
        phi, vector, cotangent = _drawn(learner, e, seed)
        x, y = e.support_x, e.support_y

        results = (
            engine.outputs(phi, x),
            engine.pullback(phi, x, cotangent),
            engine.support_grad(phi, x, y),
            engine.hvp(phi, x, y, vector),
        )
    return dict(zip(NAMES, results)), engine.network.lowered


def plain(model: nn.Module, e: mf.Episodes, loss: str, seed: int = 0) -> dict[str, Tensor]:
    """The same by autograd through the model itself; batch norms use the batch's statistics."""
    model = copy.deepcopy(model)
    for norm in model.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            norm.train()
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = None
    learner = mf.MAML(model, loss=loss)
    phi, vector, cotangent = _drawn(learner, e, seed)
    function = learner._task.loss.function
    found: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for t in range(e.tasks):
        p = phi[t].clone().requires_grad_()
        f = functional_call(model, learner._task.layout.unflatten(p), (e.support_x[t],))
        (pulled,) = torch.autograd.grad(f, p, cotangent[t], retain_graph=True)
        (g,) = torch.autograd.grad(function(f, e.support_y[t]), p, create_graph=True)
        (h,) = torch.autograd.grad(g, p, vector[t])
        for name, value in zip(NAMES, (f, pulled, g, h)):
            found[name].append(value.detach())
    return {name: torch.stack(values) for name, values in found.items()}


def _drawn(learner: mf.MAML, e: mf.Episodes, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """phi (T, P), a vector (T, P) and a cotangent (T, N, D), the same for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    theta = learner._task.theta().detach()
    outputs = learner._task.check_inputs("x", e.support_x)[-1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(theta.dtype)

    phi = theta + 0.1 * normal(e.tasks, theta.numel())
    return phi, normal(e.tasks, theta.numel()), normal(*e.support_y.shape[:2], outputs)
