"""The inner loop over a batch of tasks and its adjoint, for any update rule and whatever computes the gradients.

    phi_{k+1}, s_{k+1} = U(phi_k, g_k, s_k; psi),  g_k = grad L_support(phi_k)        forward
    lam_phi, lam_g, lam_s, d_psi = U.vjp(lam);  lam = lam_phi + H_support(phi_k) lam_g    backward

No graph is kept over the inner loop, only phi_k and g_k, (T, P) each. Truncated every n steps, step k = n, 2n, ...
takes phi_k and s_k for constants: lam and lam_s begin anew at 0 below it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metafast.engine.batches import cuts, support_of
from metafast.engine.task_model import TaskModel
from metafast.rules import Cotangents, State, UpdateRule


class AdjointEngine(ABC):
    """All tasks in one call; an engine is the four functions below."""

    def __init__(self, task: TaskModel, rule: UpdateRule, first_order: bool) -> None:
        self.task = task
        self.rule = rule
        self.first_order = first_order

    def path(
        self,
        theta: Tensor,
        support_x: Tensor,
        support_y: Tensor,
        wanted: Sequence[bool],
        batch: int | None = None,
        truncate: int | None = None,
    ) -> list[Tensor | None]:
        """phi_1..phi_K, (T, P) each, None where not wanted, in one pass; differentiable in theta and psi.

        They start from theta: (P,), or (T, P), another for each task.
        """
        inner = _Loop(tuple(wanted), batch, truncate)
        found = iter(_InnerLoop.apply(self, inner, support_x, support_y, theta, *self.rule.parameters()))
        return [next(found) if want else None for want in wanted]

    def forward(self, phi: Tensor, x: Tensor) -> Tensor:
        """(T, N, ...) outputs for x (T, N, ...) with parameters (T, P); differentiable in phi."""
        outputs: Tensor = _Forward.apply(self, phi, x)
        return outputs

    @abstractmethod
    def support_grad(self, phi: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """(T, P) gradients of the support losses at phi (T, P)."""

    @abstractmethod
    def hvp(self, phi: Tensor, x: Tensor, y: Tensor, vector: Tensor) -> Tensor:
        """(T, P) products of the support losses' Hessians at phi (T, P) with vectors (T, P)."""

    @abstractmethod
    def outputs(self, phi: Tensor, x: Tensor) -> Tensor:
        """(T, N, ...) outputs, outside of autograd."""

    @abstractmethod
    def pullback(self, phi: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
        """(T, P) cotangents of phi for those of the outputs, (T, N, ...)."""


class _Loop(NamedTuple):
    """How the inner loop goes: which of phi_1..phi_K are wanted, support samples a step, steps between cuts."""

    wanted: tuple[bool, ...]
    batch: int | None
    truncate: int | None

    def cut(self, k: int) -> bool:
        """Whether step k, which leads from phi_k, takes phi_k and s_k for constants."""
        return cuts(self.truncate, k)


class _InnerLoop(torch.autograd.Function):
    """theta (P,) or (T, P), psi -> the phi_k (T, P) that are wanted, with the adjoint recursion as its backward."""

    @staticmethod
    def forward(
        ctx: Any, engine: AdjointEngine, inner: _Loop, x: Tensor, y: Tensor, theta: Tensor, *psi: Tensor
    ) -> tuple[Tensor, ...]:
        phi = theta.detach().repeat(x.shape[0], 1) if theta.dim() == 1 else theta.detach().contiguous()
        state = engine.rule.init(phi)
        tape: list[tuple[Tensor, Tensor, State]] = []
        found = []
        for k, want in enumerate(inner.wanted):
            grads = engine.support_grad(phi, *support_of(x, y, k, inner.batch, dim=1))
            tape.append((phi, grads, state))
            phi, state = engine.rule.step(phi, grads, state)
            if want:
                # Not the tape's own tensor: an output that its own node keeps is never freed.
                found.append(phi.detach())
        ctx.engine, ctx.inner, ctx.tape = engine, inner, tape
        ctx.numbers, ctx.modes = _numbers(engine.rule), [module.training for module in engine.rule.modules()]
        ctx.set_materialize_grads(False)
        # Saved, not just kept: autograd then refuses a backward after any of them was changed in place.
        ctx.save_for_backward(x, y, theta, *psi)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        engine: AdjointEngine = ctx.engine
        x, y, theta, *psi = ctx.saved_tensors
        if _numbers(engine.rule) != ctx.numbers:
            raise RuntimeError("rule: a number of it (a rate, for instance) changed between forward and backward")
        with _as_in_forward(engine.rule, psi, ctx.modes):
            d_theta, d_psi = _InnerLoop._adjoint(ctx, cotangents, x, y, theta, psi)
        return None, None, None, None, d_theta, *d_psi

    @staticmethod
    def _adjoint(
        ctx: Any, cotangents: Sequence[Tensor | None], x: Tensor, y: Tensor, theta: Tensor, psi: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        engine: AdjointEngine = ctx.engine
        inner: _Loop = ctx.inner
        d_psi = [torch.zeros_like(p) for p in psi]
        lam: Tensor | None = None  # none yet, or none beyond a cut
        lam_state: Cotangents = ()
        coming = reversed(cotangents)
        for k, (phi, grads, state) in reversed(list(enumerate(ctx.tape))):
            if inner.wanted[k] and (own := next(coming)) is not None:
                lam = own if lam is None else lam + own
            if lam is None:
                continue
            lam_phi, lam_g, lam_state = _rule_vjp(engine.rule, (phi, grads, state), lam, lam_state, d_psi)
            if inner.cut(k):
                lam, lam_state = None, ()
            elif engine.first_order:
                lam = lam_phi
            else:
                lam = lam_phi + engine.hvp(phi, *support_of(x, y, k, inner.batch, dim=1), lam_g)
        d_theta = torch.zeros_like(theta)
        if lam is not None:
            d_theta = lam + _init_vjp(engine.rule, ctx.tape[0][0], lam_state, d_psi)
            if theta.dim() == 1:
                d_theta = d_theta.sum(0)
        return d_theta, d_psi


def _numbers(rule: UpdateRule) -> list[tuple[str, object]]:
    """What a rule's step hangs on besides its parameters, as far as it is plain numbers."""
    return [
        (f"{name}.{key}", value)
        for name, module in rule.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (int, float, str)) and key != "training"
    ]


@contextmanager
def _as_in_forward(rule: UpdateRule, psi: Sequence[Tensor], modes: Sequence[bool]) -> Iterator[None]:
    """The rule with the parameters and modes of the forward, should it have others by now (functional_call, eval)."""
    live, modules = list(rule.parameters()), list(rule.modules())
    modes_now = [module.training for module in modules]
    if len(live) != len(psi) or len(modes) != len(modes_now):
        raise RuntimeError("rule: its parameters changed between forward and backward")
    if modes_now == modes and all(a is b for a, b in zip(live, psi)):
        yield
        return
    then = {id(now): was for now, was in zip(live, psi)}
    tables = [(module._parameters, dict(module._parameters)) for module in modules]
    try:
        for module, mode in zip(modules, modes):
            module.training = mode
        for table, now in tables:
            table.update({key: then[id(p)] for key, p in now.items() if p is not None})  # type: ignore[misc]
        yield
    finally:
        for table, now in tables:
            table.update(now)
        for module, mode in zip(modules, modes_now):
            module.training = mode


class _Forward(torch.autograd.Function):
    """phi (T, P), x -> outputs (T, N, ...)."""

    @staticmethod
    def forward(ctx: Any, engine: AdjointEngine, phi: Tensor, x: Tensor) -> Tensor:
        ctx.engine = engine
        ctx.save_for_backward(phi, x)
        return engine.outputs(phi, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        phi, x = ctx.saved_tensors
        return None, ctx.engine.pullback(phi, x, cotangent), None


def _rule_vjp(
    rule: UpdateRule,
    at: tuple[Tensor, Tensor, State],
    lam: Tensor,
    lam_state: Cotangents,
    d_psi: list[Tensor],
) -> tuple[Tensor, Tensor, Cotangents]:
    """lam_phi, lam_g, lam_s of one step of the rule at (phi, g, s); adds the part of psi to ``d_psi``."""
    own = rule.vjp(*at, lam, lam_state)
    if own is not None:
        (own_phi, own_g, *own_state), own_psi = own
        for total, part in zip(d_psi, own_psi):
            if part is not None:
                total += part
        assert own_phi is not None and own_g is not None
        return own_phi, own_g, tuple(own_state)
    with torch.enable_grad():
        phi, grads, *state = (_leaf(t) for t in (at[0], at[1], *at[2]))
        new_phi, new_state = rule.step(phi, grads, tuple(state))
    inputs = (phi, grads, *state)
    lam_phi, lam_g, *rest = _pull((new_phi, *new_state), (lam, *lam_state), inputs, rule, d_psi)
    return (
        torch.zeros_like(lam) if lam_phi is None else lam_phi,
        torch.zeros_like(lam) if lam_g is None else lam_g,
        tuple(rest),
    )


def _init_vjp(rule: UpdateRule, phi: Tensor, lam_state: Cotangents, d_psi: list[Tensor]) -> Tensor:
    """Cotangent of phi_0 through the rule's first state; adds the part of psi to ``d_psi``."""
    with torch.enable_grad():
        phi = _leaf(phi)
        state = rule.init(phi)
    (lam,) = _pull(state, lam_state, (phi,), rule, d_psi)
    return torch.zeros_like(phi) if lam is None else lam


def _leaf(t: Tensor) -> Tensor:
    """The tensor cut from any graph; differentiable where it is floating (a step counter is not)."""
    t = t.detach()
    return t.requires_grad_() if t.is_floating_point() else t


def _pull(
    outputs: tuple[Tensor, ...],
    cotangents: Cotangents,
    inputs: tuple[Tensor, ...],
    rule: UpdateRule,
    d_psi: list[Tensor],
) -> Cotangents:
    """Cotangents of ``inputs``, None where nothing flows; adds those of the rule's parameters to ``d_psi``."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents) if c is not None and o.requires_grad]
    wanted = [t for t in (*inputs, *rule.parameters()) if t.requires_grad]
    if not pairs:
        return tuple(None for _ in inputs)
    found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True))
    result = tuple(next(found) if t.requires_grad else None for t in inputs)
    for parameter, total in zip(rule.parameters(), d_psi):
        part = next(found) if parameter.requires_grad else None
        if part is not None:
            total += part
    return result
