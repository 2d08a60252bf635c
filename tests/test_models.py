"""The networks: shapes, sizes, initial values, and that tools can take them apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from metafast.models import MLP, Conv4, Conv4Encoder, OmniglotFC

MODELS = [
    (lambda: MLP(1, (40, 40), 1), (7, 1), (7, 1)),
    (lambda: MLP(3, (), 2), (7, 3), (7, 2)),
    (lambda: MLP(3, [5], 2, "tanh"), (4, 7, 3), (4, 7, 2)),
    (lambda: Conv4(5), (6, 1, 28, 28), (6, 5)),
    (lambda: Conv4(20, width=8, in_channels=3, image_size=84), (2, 3, 84, 84), (2, 20)),
    (lambda: Conv4(5, width=4, image_size=9, blocks=3), (2, 1, 9, 9), (2, 5)),
    (lambda: Conv4Encoder(), (6, 1, 28, 28), (6, 64)),
    (lambda: Conv4Encoder(width=32, in_channels=3, image_size=84), (2, 3, 84, 84), (2, 800)),
    (lambda: OmniglotFC(5), (6, 1, 28, 28), (6, 5)),
    (lambda: OmniglotFC(20), (6, 784), (6, 20)),
]


@pytest.mark.parametrize(("build", "inputs", "outputs"), MODELS)
def test_shapes_and_tracing(build: Any, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
    model = build()
    x = torch.rand(inputs, generator=torch.Generator().manual_seed(0))
    assert model(x).shape == outputs
    traced = torch.fx.symbolic_trace(model)
    called = {node.op for node in traced.graph.nodes}
    assert called <= {"placeholder", "call_module", "output"}  # nothing but layers in a row
    assert torch.equal(traced(x), model(x))


def test_parameter_counts_of_the_papers() -> None:
    def count(model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    assert count(MLP(1, (40, 40), 1)) == 1761
    assert count(Conv4Encoder()) == 111_936
    assert count(Conv4(5)) == 112_261
    assert count(Conv4(5, width=32, in_channels=3, image_size=84)) == 32_901
    assert count(OmniglotFC(5)) == 247_621


@pytest.mark.parametrize(("build", "inputs", "outputs"), MODELS)
def test_weights_are_xavier_and_biases_zero(build: Any, inputs: Any, outputs: Any) -> None:
    layers = [m for m in build().modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert layers
    for layer in layers:
        window = layer.weight[0, 0].numel()
        fan_in, fan_out = layer.weight.shape[1] * window, layer.weight.shape[0] * window
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std() > 0
        assert layer.bias is not None
        assert not layer.bias.any()


def test_seed_decides_the_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.utils.parameters_to_vector(Conv4(5, width=4).parameters())

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_layers_in_order() -> None:
    kinds = [type(m) for m in Conv4Encoder(width=4, blocks=2).layers]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d] * 2 + [nn.Flatten]
    assert [type(m) for m in MLP(1, (4, 4), 1, "gelu").layers] == [nn.Linear, nn.GELU] * 2 + [nn.Linear]
    assert [type(m) for m in OmniglotFC(5).layers][:4] == [nn.Flatten, nn.Linear, nn.BatchNorm1d, nn.ReLU]


@pytest.mark.parametrize(
    ("error", "pattern", "build"),
    [
        (ValueError, "in_features: ", lambda: MLP(0, (4,), 1)),
        (ValueError, "out_features: ", lambda: MLP(1, (4,), 0)),
        (ValueError, "hidden: ", lambda: MLP(1, (4, 0), 1)),
        (TypeError, "hidden: ", lambda: MLP(1, 40, 1)),  # type: ignore[arg-type]
        (TypeError, "hidden: ", lambda: MLP(1, (40.0,), 1)),  # type: ignore[arg-type]
        (ValueError, "activation: .*'relu'", lambda: MLP(1, (4,), 1, "cube")),
        (TypeError, "in_features: ", lambda: MLP(True, (4,), 1)),
        (ValueError, "ways: ", lambda: Conv4(0)),
        (TypeError, "ways: ", lambda: Conv4(5.0)),  # type: ignore[arg-type]
        (ValueError, "width: ", lambda: Conv4(5, width=0)),
        (ValueError, "in_channels: ", lambda: Conv4Encoder(in_channels=0)),
        (ValueError, "image_size: ", lambda: Conv4Encoder(image_size=0)),
        (ValueError, "blocks: expected at most 4, as 28 pixels", lambda: Conv4(5, blocks=5)),
        (ValueError, "blocks: ", lambda: Conv4(5, blocks=0)),
        (ValueError, "ways: ", lambda: OmniglotFC(-1)),
    ],
)
def test_refuses(error: type[Exception], pattern: str, build: Any) -> None:
    with pytest.raises(error, match=f"^{pattern}"):
        build()
