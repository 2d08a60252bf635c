"""Small networks for the learners' cases: with kinks for float64, smooth for float32.

In float32 a pre-activation near 0 may fall on either side of a ReLU, which moves the gradient by far more than
rounding; nothing could be told from such an error.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from metafast.models import MLP, Conv4

WAYS = 3


class Residual(nn.Module):
    """Two skip connections around layer-normed branches."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7)
        self.second = nn.Linear(7, 7)
        self.activation = activation()
        self.last_norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6) -> (N, 3)."""
        h = self.activation(self.first(x))
        h = h + self.activation(self.second(self.norm(h)))
        y: Tensor = self.head(h + self.last_norm(h))
        return y


def smooth_conv4() -> nn.Module:
    """Conv4 with softplus and average pooling."""
    layers: list[nn.Module] = []
    for inputs in (1, 5, 5, 5):
        layers += [nn.Conv2d(inputs, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Softplus(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(5, WAYS))


def _layer_norm(activation: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), activation(), nn.Linear(9, WAYS))


NETS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: MLP(6, (11, 13), WAYS, activation="relu"),
    "Conv4, batch norm": lambda: Conv4(WAYS, width=5, image_size=16),
    "layer norm": lambda: _layer_norm(nn.ReLU),
    "residual": lambda: Residual(nn.ReLU),
}
SMOOTH_NETS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: MLP(6, (11, 13), WAYS, activation="tanh"),
    "Conv4, batch norm": smooth_conv4,
    "layer norm": lambda: _layer_norm(nn.Tanh),
    "residual": lambda: Residual(nn.Softplus),
}
INPUT_SHAPES: dict[str, tuple[int, ...]] = {
    "MLP": (6,),
    "Conv4, batch norm": (1, 16, 16),
    "layer norm": (6,),
    "residual": (6,),
}
