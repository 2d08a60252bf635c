"""Convolutions by Winograd's algorithm: odd sizes, paddings and samples against plain autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import metafast as mf
from tests.backends import native as needs_kernels
from tests.engine import four_functions
from tests.engine.test_layers import BAR, episodes_of, head
from tests.nets import gradient, relative_error


def winograd_from(model: nn.Module, e: mf.Episodes, loss: str = "cross_entropy") -> list[int]:
    """From how many samples each convolution goes by Winograd's algorithm, 0: never."""
    learner = mf.MAML(model, loss=loss)
    with mf.use_backend("cpu"):
        engine = learner._engines(e.support_x, e.support_y)
    found: list[int] = engine.network.engine.winograd_from()
    return found


# Channels in and out, height and width, padding, samples: tiles of 4, one less and one more; more tiles than a block.
SIZES = [
    (16, 16, (4, 4), 1, 7),
    (32, 17, (5, 4), 1, 9),
    (48, 48, (3, 3), 1, 13),
    (33, 16, (7, 8), 1, 3),
    (17, 31, (9, 13), 0, 2),
    (24, 12, (6, 5), 2, 5),
    (13, 40, (12, 1), (1, 3), 11),
    (16, 16, (14, 14), 1, 7),
    (64, 65, (7, 7), 1, 5),
]


@needs_kernels
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("c", "outputs", "size", "padding", "samples"), SIZES)
def test_four_functions(
    c: int, outputs: int, size: tuple[int, int], padding: int | tuple[int, int], samples: int, first: bool
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(c, outputs, 3, padding=padding, bias=c % 2 == 0)
    if first:
        model, shape = head(conv, shape=(c, *size)), (c, *size)
    else:
        model, shape = head(conv, nn.Conv2d(2, c, 1), nn.Tanh(), shape=(2, *size)), (2, *size)
    e = episodes_of(shape, samples)
    found, _ = four_functions.native(model, e, "cross_entropy")
    wanted = four_functions.plain(model, e, "cross_entropy")
    for what in four_functions.NAMES:
        assert relative_error(found[what], wanted[what]) < BAR, what
    # The network's own input is as it came: its channels may be no whole vectors.
    assert 0 < winograd_from(model, e)[-1] <= samples or (first and c % 8 != 0)


@needs_kernels
def test_the_same_bits_however_many_samples_a_block_has() -> None:
    """A sample's outputs do not hang on its neighbours: with one more, the tiles fall into other blocks."""
    torch.manual_seed(0)
    model = head(nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(2, 32, 1), shape=(2, 9, 9))
    e = episodes_of((2, 9, 9), 23)
    learner = mf.MAML(model)
    with mf.use_backend("cpu"):
        engine = learner._engines(e.support_x, e.support_y)
        phi = learner._task.theta().detach().expand(2, -1).contiguous()
        whole = engine.outputs(phi, e.support_x)
        part = engine.outputs(phi, e.support_x[:, :22].contiguous())
    assert 0 < engine.network.engine.winograd_from()[-1] <= 22
    assert torch.equal(whole[:, :22], part)


@needs_kernels
@pytest.mark.parametrize("seed", range(7))
@pytest.mark.parametrize("pixels", [7, 14])
def test_float32_rounds_little(pixels: int, seed: int) -> None:
    """House rule 13, with the channels of Conv4. By squared errors: cross-entropy of logits as large as these drawn
    ones amplifies whatever the last bits are, torch's and ours, up to twelve times one way or the other by chance."""
    torch.manual_seed(seed)
    model = head(nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(2, 64, 1), nn.Tanh(), shape=(2, pixels, pixels))
    e = episodes_of((2, pixels, pixels), 9, "mse")
    exact = four_functions.plain(model, e, "mse")
    single, e32 = copy.deepcopy(model).float(), e.to(dtype=torch.float32)
    found, _ = four_functions.native(single, e32, "mse")
    torchs = four_functions.plain(single, e32, "mse")
    assert 0 < winograd_from(single, e32, "mse")[-1] <= 9
    for what in four_functions.NAMES:
        error, allowed = (relative_error(r[what].double(), exact[what]) for r in (found, torchs))
        assert error < 2 * allowed + 1e-6, what


@needs_kernels
def test_a_whole_meta_gradient_in_float32() -> None:
    """Four blocks, two steps, with nothing that a rounding could flip: twice torch's error and the floor of
    ``metafast check``, 1e-5, which is what this algorithm costs."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (1, 64, 64, 64):
        layers += [nn.Conv2d(inputs, 64, 3, padding=1), nn.BatchNorm2d(64), nn.Tanh(), nn.AvgPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3)).double()
    e = episodes_of((1, 28, 28), 6)
    found = {}
    for name, dtype in (("exact", torch.float64), ("torch", torch.float32), ("native", torch.float32)):
        model.zero_grad()
        model.to(dtype)
        if name == "native":
            with mf.use_backend("cpu"):
                mf.MAML(model, lr=0.1, steps=2)(e.to(dtype=dtype)).loss.backward()
        else:
            mf.reference.maml(model, e.to(dtype=dtype), lr=0.1, steps=2).loss.backward()
        found[name] = gradient(model).double()
    error, allowed = (relative_error(found[name], found["exact"]) for name in ("native", "torch"))
    assert error < 2 * allowed + 1e-5
