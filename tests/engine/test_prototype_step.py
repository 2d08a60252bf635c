"""A step of Prototypical Networks as one native call: both doors, any cotangent, any threads, against the reference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from metafast.ops.prototypes import METRICS
from tests.backends import native, on_cpu_and_simt
from tests.nets import build, episodes_for, gradient, relative_error

BAR = 1e-10


@pytest.fixture(autouse=True)
def native_backend(request: pytest.FixtureRequest) -> object:
    call = getattr(request.node, "callspec", None)
    with mf.use_backend("cpu" if call is None else call.params.get("backend", "cpu")):
        yield


@on_cpu_and_simt
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["mlp", "conv4", "batch_norm", "residual"])
def test_both_doors(name: str, metric: str, backend: str) -> None:
    model, episodes = build(name), episodes_for(name)
    weights = torch.rand(episodes.tasks, dtype=torch.float64)
    proto = mf.ProtoNets(model, metric)
    assert proto._one_call(episodes, weights) is not None
    out = proto(episodes, weights)
    out.loss.backward()
    by_autograd = gradient(model)
    model.zero_grad()
    direct = proto.accumulate_grad(episodes, weights)
    by_hand = gradient(model)
    model.zero_grad()
    wanted = mf.reference.protonets(model, episodes, metric=metric, weights=weights)
    wanted.loss.backward()
    for found in (out, direct):
        assert relative_error(found.losses, wanted.losses) <= BAR
        assert relative_error(found.logits, wanted.logits) <= BAR
        assert torch.equal(found.accuracy, wanted.accuracy)
    for found in (by_autograd, by_hand):
        assert relative_error(found, gradient(model)) <= BAR


@on_cpu_and_simt
def test_any_cotangent_and_shuffled_labels_of_uneven_classes(backend: str) -> None:
    model, e = build("batch_norm"), episodes_for("batch_norm", shots=4)
    torch.manual_seed(0)
    support_y = torch.stack([torch.tensor([0, 1, 2, 2, 2, 0, 1, 2, 2, 2, 2, 0])[torch.randperm(12)] for _ in range(4)])
    query_y = torch.randint(3, e.query_y.shape)
    e = mf.Episodes(e.support_x, support_y, e.query_x, query_y)

    def objective(out: mf.Outcome) -> Tensor:
        return out.loss * 0.5 + (out.losses**2).sum() + (out.logits.tanh() * 0.3).sum()

    loss = objective(mf.ProtoNets(model)(e))
    loss.backward(retain_graph=True)
    once = gradient(model)
    loss.backward()
    assert relative_error(gradient(model), 2 * once) <= 1e-14
    model.zero_grad()
    objective(mf.reference.protonets(model, e)).backward()
    assert relative_error(once, gradient(model)) <= BAR


@native
@pytest.mark.parametrize("tasks", [1, 3])
def test_the_same_bits_with_any_number_of_threads(tasks: int) -> None:
    torch.manual_seed(0)
    encoder = mf.models.Conv4Encoder(33, image_size=20)
    x, y = torch.randn(tasks, 60, 1, 20, 20), torch.arange(20).repeat(tasks, 3)
    episodes = mf.Episodes(x[:, :40], y[:, :40], x[:, 40:], y[:, 40:])
    proto, found = mf.ProtoNets(encoder), {}
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        proto.zero_grad()
        out = proto.accumulate_grad(episodes)
        found[threads] = (gradient(encoder), out.logits, out.losses)
    for results in found.values():
        assert all(torch.equal(result, wanted) for result, wanted in zip(results, found[1]))


@on_cpu_and_simt
def test_float32_errs_at_most_twice_as_much_as_torch_in_float32(backend: str) -> None:
    model, episodes = build("mlp"), episodes_for("mlp", tasks=8)
    found = {}
    for run, dtype in (("exact", torch.float64), ("plain", torch.float32), ("native", torch.float32)):
        net, e = copy.deepcopy(model).to(dtype), episodes.to(dtype=dtype)
        if run == "native":
            mf.ProtoNets(net).accumulate_grad(e)
        else:
            mf.reference.protonets(net, e).loss.backward()
        found[run] = gradient(net).double()
    error, plain = (relative_error(found[run], found["exact"]) for run in ("native", "plain"))
    assert error <= 2 * plain + 1e-6


@on_cpu_and_simt
def test_no_gradient_is_no_graph_and_bad_labels_touch_nothing(backend: str) -> None:
    model, e = build("mlp"), episodes_for("mlp")
    proto = mf.ProtoNets(model)
    with torch.no_grad():
        out = proto(e)
    assert not out.loss.requires_grad
    assert torch.equal(out.logits, proto(e).logits.detach())
    for bad in (e.query_y + 1, e.query_y - 1):
        with pytest.raises(ValueError, match="query_y"):
            proto.accumulate_grad(mf.Episodes(e.support_x, e.support_y, e.query_x, bad))
    assert all(p.grad is None for p in model.parameters())


@native
def test_an_encoder_that_is_not_lowered_goes_by_torch() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(self.layer(x)).real

    model, episodes = Odd().double(), episodes_for("mlp")
    with mf.use_backend("auto"), pytest.warns(UserWarning, match="runs by torch"):
        out = mf.ProtoNets(model)(episodes)
    out.loss.backward()
    found = gradient(model)
    model.zero_grad()
    wanted = mf.reference.protonets(model, episodes)
    wanted.loss.backward()
    assert relative_error(found, gradient(model)) <= BAR
