"""MAML in JAX, ``jit(vmap(grad(task)))`` of a fully connected net, the weights those of the torch module.

No convolutions: XLA on the CPU (jaxlib 0.10.2) compiles the batched second derivative of one to wrong numbers, off
by a third, where the same without ``jit`` agrees with torch to 1e-15; one task after the other (``lax.map``) is right
and takes ten times as long as torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metafast.bench.sides import Prepared
from metafast.bench.workloads import Problem

# JAX's arrays and modules have no types here: it need not be installed.
Array = Any
Layer = Callable[[list[Array], Array], Array]


def jax_prepared(problem: Problem, model: nn.Module) -> Prepared:
    """The problem in JAX, compiled at the first step, which waits for its result.

    Raises:
        TypeError: the model has a layer that is not translated here.
    """
    jax = importlib.import_module("jax")
    jnp = importlib.import_module("jax.numpy")
    # Allows float64; float32 stays float32.
    jax.config.update("jax_enable_x64", True)
    w, e = problem.workload, problem.episodes
    on_gpu = e.support_x.device.type == "cuda"
    if on_gpu:
        if jax.default_backend() != "gpu":
            raise RuntimeError(f"this JAX computes on {jax.default_backend()}, not on the GPU")
        jax.config.update("jax_default_matmul_precision", "highest")  # no TF32, as for everybody
    forward = _chain(jax, jnp, model)

    def loss(params: list[Array], x: Array, y: Array) -> Array:
        outputs = forward(params, x)
        if w.loss == "mse":
            return ((outputs - y) ** 2).mean()
        logp = jax.nn.log_softmax(outputs)
        return -jnp.take_along_axis(logp, y[:, None], axis=1).mean()

    def task(params: list[Array], xs: Array, ys: Array, xq: Array, yq: Array) -> Array:
        for _ in range(w.steps):
            grads = jax.grad(loss)(params, xs, ys)
            params = [p - w.lr * g for p, g in zip(params, grads)]
        return loss(params, xq, yq)

    @jax.jit  # type: ignore[untyped-decorator]
    def meta_gradient(params: list[Array], *sets: Array) -> list[Array]:
        each = jax.vmap(jax.grad(task), in_axes=(None, 0, 0, 0, 0))(params, *sets)
        return [g.mean(0) for g in each]

    params = [jnp.asarray(p.detach().cpu().numpy()) for p in model.parameters()]
    sets = [jnp.asarray(t.cpu().numpy()) for t in (e.support_x, e.support_y, e.query_x, e.query_y)]
    last: list[Array] = []

    def step() -> None:
        last[:] = jax.block_until_ready(meta_gradient(params, *sets))

    def gradient() -> Tensor:
        # Copied: JAX's buffers cannot be written.
        return torch.cat([torch.from_numpy(g.__array__().copy()).reshape(-1) for g in last])

    return Prepared(step, gradient)


def _chain(jax: Any, jnp: Any, model: nn.Module) -> Layer:
    """The forward of a module whose leaves run one after the other, as metafast.models' do."""
    layers: list[tuple[Layer, int]] = []
    for leaf in model.modules():
        if not any(True for _ in leaf.children()):
            layers.append((_layer(jax, jnp, leaf), sum(1 for _ in leaf.parameters())))

    def forward(params: list[Array], x: Array) -> Array:
        at = 0
        for layer, count in layers:
            x = layer(params[at : at + count], x)
            at += count
        return x

    return forward


def _layer(jax: Any, jnp: Any, leaf: nn.Module) -> Layer:
    """A layer as a function of its parameters and its input; batch norms by the statistics of the batch."""
    if isinstance(leaf, nn.Linear):
        return lambda p, x: x @ p[0].T + p[1]
    if isinstance(leaf, nn.ReLU):
        return lambda p, x: jax.nn.relu(x)
    if isinstance(leaf, nn.Tanh):
        return lambda p, x: jnp.tanh(x)
    if isinstance(leaf, nn.Flatten):
        return lambda p, x: x.reshape(x.shape[0], -1)
    if isinstance(leaf, nn.BatchNorm1d):
        eps = leaf.eps

        def norm(p: list[Array], x: Array) -> Array:
            centred = x - x.mean(0)
            return centred / jnp.sqrt((centred**2).mean(0) + eps) * p[0] + p[1]

        return norm
    raise TypeError(f"model: there is no translation to JAX of {leaf}")
