"""hvp of a network's loss: the registered operator and PyTorch's derivatives, against double backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from metafast.engine.networks import NativeNetwork
from metafast.engine.task_model import TaskModel
from metafast.losses import NAMED, resolve_loss
from tests.backends import LEARNER_BACKENDS, in_every_order, on_cpu_and_simt, poisoned
from tests.nets import build, episodes_for, relative_error

BAR = 1e-10


def problem(name: str, loss: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    model, episodes = build(name), episodes_for(name)
    x, y = episodes.support_x[0], episodes.support_y[0]
    if loss == "mse":
        y = torch.randn(len(x), 3, dtype=torch.float64)
    params = {n: p.detach() + 0.01 for n, p in model.named_parameters() if p.requires_grad}
    return model, params, {n: torch.randn_like(p) for n, p in params.items()}, x, y


def by_double_backward(
    model: nn.Module, params: dict[str, Tensor], vector: dict[str, Tensor], x: Tensor, y: Tensor, loss: str
) -> Tensor:
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    value = NAMED[loss](torch.func.functional_call(model, leaves, (x,)), y)
    grads = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
    product = torch.autograd.grad(grads, list(leaves.values()), list(vector.values()), materialize_grads=True)
    return torch.cat([p.reshape(-1) for p in product])


def flat(values: object) -> Tensor:
    assert isinstance(values, dict)
    return torch.cat([v.reshape(-1) for v in values.values()])


@pytest.mark.parametrize("backend", LEARNER_BACKENDS)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", ["mlp", "conv4", "residual", "layer_norm"])
def test_of_a_networks_loss(name: str, loss: str, backend: str) -> None:
    model, params, vector, x, y = problem(name, loss)

    def product() -> Tensor:
        found = mf.ops.hvp(model, params, vector, x, y, loss=loss)
        assert list(found) == list(params)
        return flat(found)

    with mf.use_backend(backend), poisoned():
        found = in_every_order(backend, product)
    assert relative_error(found, by_double_backward(model, params, vector, x, y, loss)) <= BAR


@on_cpu_and_simt
def test_twice_and_what_the_kernels_cannot_differentiate(backend: str) -> None:
    model, params, vector, x, y = problem("mlp", "cross_entropy")
    wanted = by_double_backward(model, params, vector, x, y, "cross_entropy")
    # d(v . H v) / dv = 2 H v, through the operator.
    along = {n: v.clone().requires_grad_() for n, v in vector.items()}
    with mf.use_backend(backend):
        energy = (flat(mf.ops.hvp(model, params, along, x, y, loss="cross_entropy")) * flat(along)).sum()
    twice = torch.cat([g.reshape(-1) for g in torch.autograd.grad(energy, list(along.values()))])
    assert relative_error(twice, 2 * wanted) <= BAR
    # With params that require gradients PyTorch's derivatives do it: a third one exists there.
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    product = flat(mf.ops.hvp(model, leaves, vector, x, y, loss="cross_entropy"))
    assert relative_error(product, wanted) <= BAR
    refused = f"^params: backend '{backend}' is forced, but params require"
    with mf.use_backend(backend), pytest.raises(ValueError, match=refused):
        mf.ops.hvp(model, leaves, vector, x, y, loss="cross_entropy")
    third = torch.autograd.grad(product.sum(), list(leaves.values()))
    assert all(torch.isfinite(t).all() for t in third) and any(t.norm() > 0 for t in third)


def operator_arguments() -> tuple:
    model, params, vector, x, y = problem("mlp", "cross_entropy")
    task = TaskModel(model, resolve_loss("cross_entropy"), "batch")
    network = NativeNetwork(task, x.shape[1:], x.dtype)
    ints, numbers = network.lowered.descriptor("cross_entropy")
    rows = [torch.cat([t.reshape(-1) for t in d.values()]).unsqueeze(0) for d in (params, vector)]
    return (*rows, x.new_empty(0), x.unsqueeze(0), y.unsqueeze(0), ints, numbers)


@on_cpu_and_simt
def test_opcheck_and_gradcheck(backend: str) -> None:
    with mf.use_backend(backend):
        check_the_operator()


def check_the_operator() -> None:
    params, vector, *rest = operator_arguments()
    torch.library.opcheck(torch.ops.metafast.hvp.default, (params, vector, *rest))
    torch.library.opcheck(torch.ops.metafast.hvp.default, (params, vector.clone().requires_grad_(), *rest))
    places = torch.arange(0, vector.shape[1], 11)

    def of_few(few: Tensor) -> Tensor:
        return torch.ops.metafast.hvp(params, vector.index_copy(1, places, few), *rest)[:, places]

    torch.autograd.gradcheck(of_few, vector[:, places].clone().requires_grad_())
    product = torch.ops.metafast.hvp(params.clone().requires_grad_(), vector, *rest)
    with pytest.raises(NotImplementedError, match="differentiable in its vector only"):
        product.sum().backward()
    with pytest.raises(ValueError, match="vector: expected shape"):
        torch.ops.metafast.hvp(params, vector[:, 1:], *rest)


def test_compiles_in_one_graph() -> None:
    model, params, vector, x, y = problem("mlp", "cross_entropy")
    compiled = torch.compile(
        lambda p, v, x, y: mf.ops.hvp(model, p, v, x, y, loss="cross_entropy"), fullgraph=True, backend="aot_eager"
    )
    found = flat(compiled(params, vector, x, y))
    assert relative_error(found, by_double_backward(model, params, vector, x, y, "cross_entropy")) <= BAR


def test_bad_arguments() -> None:
    model, params, vector, x, y = problem("mlp", "cross_entropy")

    def call(model: object = model, params: object = params, vector: object = vector, *batch: object) -> object:
        return mf.ops.hvp(model, params, vector, *(batch or (x, y)), loss="cross_entropy")

    with pytest.raises(TypeError, match="fn_or_module: with loss='cross_entropy' expected a module"):
        call(lambda p: p)
    with pytest.raises(TypeError, match="batch: .* expected x and y, got 1"):
        call(model, params, vector, x)
    with pytest.raises(ValueError, match="params: expected the module's trainable"):
        call(model, dict(list(params.items())[1:]), dict(list(vector.items())[1:]))
    with pytest.raises(ValueError, match="y: expected labels below 3"):
        call(model, params, vector, x, y + 5)
    with pytest.raises(ValueError, match="x: .*NaN|x: .*finite"):
        call(model, params, vector, x * float("nan"), y)
    with pytest.raises(ValueError, match="loss: "):
        mf.ops.hvp(model, params, vector, x, y, loss="hinge")
