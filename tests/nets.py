"""Small networks and episodes that the exactness tests share; float64, smooth or with kinks far from the data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import metafast as mf
from metafast.checks.compare import flat_gradient
from metafast.learners.learner import Learner


class Residual(nn.Module):
    """Two skip connections around layer-normed branches."""

    def __init__(self, features: int = 6, ways: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(features, 7)
        self.norm = nn.LayerNorm(7)
        self.second = nn.Linear(7, 7)
        self.head = nn.Linear(7, ways)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        h = h + torch.tanh(self.second(self.norm(h)))
        return self.head(h + torch.sigmoid(h))


def conv4() -> nn.Module:
    return mf.models.Conv4(3, width=5, in_channels=1, image_size=16)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 11), nn.ReLU(), nn.Linear(11, 13), nn.ReLU(), nn.Linear(13, 3))


def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 3))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))


def nested() -> nn.Module:
    inner = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.GELU(), nn.Linear(8, 5)))
    return nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), inner, nn.Linear(5, 3))


def group_norm() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 2),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    net[2].weight = net[0].weight
    return net


def partly_frozen() -> nn.Module:
    net = mlp()
    net[0].weight.requires_grad_(False)
    return net


NETS: dict[str, Callable[[], nn.Module]] = {
    "conv4": conv4,
    "mlp": mlp,
    "layer_norm": layer_norm,
    "batch_norm": batch_norm,
    "residual": Residual,
    "nested": nested,
    "group_norm": group_norm,
    "tied": tied,
    "partly_frozen": partly_frozen,
}


# Nets that the kernels do not take.
NOT_LOWERED = {"tied"}


def build(name: str, seed: int = 0) -> nn.Module:
    """The named net in float64; its norms' affine weights are moved off 1 and 0, where errors could hide."""
    torch.manual_seed(seed)
    net = NETS[name]().double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def episodes_for(name: str, tasks: int = 4, shots: int = 3, queries: int = 5, seed: int = 1) -> mf.Episodes:
    """3-way float64 episodes of the inputs that the named net takes."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 16, 16) if name == "conv4" else (6,)

    def side(per_class: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(3).repeat_interleave(per_class).repeat(tasks, 1)
        x = torch.randn(tasks, 3 * per_class, *shape, dtype=torch.float64, generator=generator)
        return x, y

    return mf.Episodes(*side(shots), *side(queries))


def gradient(module: nn.Module) -> Tensor:
    """The flattened .grad of all parameters that require gradients."""
    return flat_gradient(module.parameters())


def both_doors(learner: Learner, episodes: mf.Episodes, weights: Tensor | None = None) -> tuple[mf.Outcome, Tensor]:
    """The outcome and the gradient, the same bits through both."""
    learner.zero_grad()
    out = learner(episodes, weights)
    out.loss.backward()
    found = gradient(learner)
    learner.zero_grad()
    accumulated = learner.accumulate_grad(episodes, weights)
    assert torch.equal(gradient(learner), found)
    assert torch.equal(accumulated.logits, out.logits) and torch.equal(accumulated.losses, out.losses)
    assert not accumulated.loss.requires_grad
    learner.zero_grad()
    return out, found


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|; refuses a zero reference, against which nothing can be wrong."""
    found, wanted = found.detach(), wanted.detach()
    assert float(wanted.norm()) > 0
    return float((found - wanted).norm() / wanted.norm())
