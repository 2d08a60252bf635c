"""Lowered networks, as the extension's kernels run them.

From the public function to the loop: metafast/learners -> here -> csrc/torch/engine.cpp -> csrc/cpu/unroll.h or
csrc/cuda/engine.cu, and in both csrc/engine/unroll.h.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from metafast import _check, _native
from metafast.backend import Refusal, current_backend
from metafast.engine.guard import Guard, NotLowered, hooked
from metafast.engine.lowering.lower import lower
from metafast.engine.recent import remember

if TYPE_CHECKING:
    from metafast.engine.again import Again
    from metafast.engine.task_model import TaskModel
    from metafast.episodes import Episodes
    from metafast.rules import PlainOptimizer

_DTYPES = (torch.float32, torch.float64)
_MOST_KEPT = 4
_MOST_SHAPES = 16  # of samples: a network of global pooling takes many, each with its own workspaces
_MOST_SIGNATURES = 1024


def compiled(descriptor: tuple[tuple[int, ...], tuple[float, ...]], dtype: torch.dtype) -> Any:
    """The extension's engine for a lowered network, by its numbers; NotLowered where that refuses it."""
    extension = _native.native()
    assert extension is not None  # its users asked before
    try:
        return extension.Engine(*descriptor, dtype)
    except ValueError as error:
        raise NotLowered(f"the engine refuses the network: {error}") from error


class Inner(NamedTuple):
    """An inner loop that is one call of the extension.

    Attributes:
        steps: K.
        rates: of phi - rate g: one for all, or (1, P) or (K, P).
        first_order: drop the Hessian term.
        batch: support samples of a step, None: all.
        query_weights: v_1..v_K of the query losses after each step, None: only the last counts.
        truncate: steps between cuts of the adjoint, None: none.
        learn_init: whether the parameters get a gradient.
        optimizer: O of the steps phi - rate O(g, s), None: O(g) is g.
    """

    steps: int
    rates: float | Tensor
    first_order: bool
    batch: int | None
    query_weights: tuple[float, ...] | None
    truncate: int | None
    learn_init: bool
    optimizer: PlainOptimizer | None


class NativeNetwork:
    """A task's model as the extension runs it, for samples of one shape and dtype.

    Attributes:
        lowered: what was lowered.
        descriptor: that and the loss as numbers, see :meth:`Lowered.descriptor`.
        parameters: the trainable parameters, in layout order.
        holds: whether the module still is what was lowered.
        watched: what that question looks at; None where that is not all.
    """

    def __init__(self, task: TaskModel, sample_shape: torch.Size, dtype: torch.dtype) -> None:
        if not task.loss.named:
            raise NotLowered(f"the loss {task.loss.name} is not one of the losses that have kernels")
        guard = Guard(task.model)
        self.lowered = lower(task.model, tuple(sample_shape), task.batch_norm)
        self.holds = guard.holds
        self.watched = guard.watched if guard.is_plain else None
        self.descriptor = self.lowered.descriptor(task.loss.name)
        self.engine = compiled(self.descriptor, dtype)
        self.parameters = list(task.layout.parameters(task.model))
        named = dict(task.model.named_parameters())
        self._frozen = [named[name] for name in self.lowered.constants]

    def hooked(self) -> bool:
        """Whether a parameter has hooks, which only autograd calls."""
        return hooked(self.parameters)

    def constants(self) -> Tensor | None:
        """(F,) the frozen parameters' numbers, None where there are none."""
        if not self._frozen:
            return None
        return torch.cat([p.detach().reshape(-1) for p in self._frozen])

    def meta_step(
        self, episodes: Episodes, inner: Inner, weights: Tensor | None, accumulate: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """loss, losses (T,), logits (T, Nq, D) and accuracy (T,) of an inner loop.

        The first three are differentiable in the parameters, the rates and the optimiser's weights; with
        ``accumulate`` they are not, and the meta-gradient is added to ``.grad``.
        """
        call = self.engine.accumulate if accumulate else self.engine.meta_step
        uneven = isinstance(inner.rates, Tensor)
        optimizer = inner.optimizer
        if optimizer is not None and optimizer.weights[0].dtype != self.parameters[0].dtype:
            raise TypeError(
                f"optimizer: expected weights of dtype {self.parameters[0].dtype} as the model's, "
                f"got {optimizer.weights[0].dtype}"
            )
        if optimizer is not None and optimizer.size not in (None, self.lowered.adapting):
            raise ValueError(f"moves: expected one for each of {self.lowered.adapting}, got {optimizer.size}")
        result: tuple[Tensor, Tensor, Tensor, Tensor | None] = call(
            self.parameters if inner.learn_init else [p.detach() for p in self.parameters],
            self.constants(),
            episodes.support_x,
            episodes.support_y,
            episodes.query_x,
            episodes.query_y,
            inner.steps,
            0.0 if uneven else inner.rates,
            inner.rates if uneven else None,
            inner.first_order,
            inner.batch or 0,
            inner.query_weights or (),
            inner.truncate or 0,
            () if optimizer is None else optimizer.weights,
            0.0 if optimizer is None else optimizer.p,
            None if optimizer is None else optimizer.moves,
            weights,
            0,
            "",
        )
        return result

    def prototypes(
        self, episodes: Episodes, ways: int, metric: str, weights: Tensor | None, accumulate: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """loss, losses (T,), logits (T, Nq, ways) and accuracy (T,) of Prototypical Networks, as :meth:`meta_step`."""
        call = self.engine.accumulate if accumulate else self.engine.meta_step
        sides = (episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y)
        no_loop = (0, 0.0, None, False, 0, (), 0, (), 0.0, None)
        result: tuple[Tensor, Tensor, Tensor, Tensor | None] = call(
            self.parameters, self.constants(), *sides, *no_loop, weights, ways, metric
        )
        return result


class Networks:
    """The native networks of one task model: lowered at first use, again when the module has changed."""

    def __init__(self, task: TaskModel) -> None:
        self._task = task
        # The latest last; several where the module goes back and forth, between train and eval for instance.
        self._found: OrderedDict[tuple[torch.Size, torch.dtype], list[NativeNetwork]] = OrderedDict()
        # Why not, and the modes in which that was so.
        self._refused: OrderedDict[tuple[torch.Size, torch.dtype], tuple[str, tuple[bool, ...]]] = OrderedDict()
        self._warned = False
        self.again: Again | None = None  # the latest plain meta-step's, for the next one
        self.agains: OrderedDict[Hashable, Again] = OrderedDict()  # by the signatures of episodes, which may alternate
        self._fitting: OrderedDict[Hashable, NativeNetwork] = OrderedDict()

    def known(self, signature: Hashable) -> NativeNetwork | None:
        """The network for episodes of a signature that is known to fit it, in a few microseconds."""
        network = self._fitting.get((signature, current_backend()))
        if network is None or not network.holds():
            return None
        return None if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda") else network

    def remember(self, signature: Hashable, network: NativeNetwork) -> None:
        """Episodes of a signature fit a network, by the backend in force."""
        remember(self._fitting, (signature, current_backend()), network, _MOST_SIGNATURES)

    def __call__(self, x: Tensor) -> NativeNetwork | None:
        """The network for inputs x (T, N, ...); None where torch runs them.

        Raises:
            ValueError: a native backend is forced that cannot run them.
        """
        backend = current_backend()
        if backend == "torch":
            return None
        found = self._why_not(x) or self._lower((x.shape[2:], x.dtype))
        if isinstance(found, NativeNetwork):
            return found
        if backend != "auto":
            raise Refusal(f"{self._task.argument}: backend {backend!r} is forced, but {found}")
        return None

    def reason(self, x: Tensor) -> str | None:
        """Why the network for inputs x (T, N, ...) is not native; None where it is."""
        found = self._why_not(x) or self._lower((x.shape[2:], x.dtype))
        return found if isinstance(found, str) else None

    def warn(self, x: Tensor) -> None:
        """Say once, for each model, that torch runs what the extension could not take; quiet without an extension."""
        backend = current_backend()
        if self._warned or backend == "torch" or _native.missing(x.device.type if backend == "auto" else backend):
            return
        self._warned = True
        warnings.warn(
            f"metafast: {type(self._task.model).__name__} runs by torch, without native kernels: {self.reason(x)}",
            UserWarning,
            stacklevel=7,
        )

    def _why_not(self, x: Tensor) -> str | None:
        status = _native.status()
        if not status.available:
            return f"there is no extension: {status.reason}"
        device, backend = x.device.type, current_backend()
        if device not in ("cpu", "cuda"):
            return f"there are no kernels for networks on {x.device}"
        wanted = backend if backend in ("cpu", "simt", "cuda") else device
        if reason := _native.missing(wanted):
            return f"there are no kernels for networks on {x.device}: {reason}"
        if device != ("cpu" if wanted == "simt" else wanted):
            return f"the inputs are on {x.device}"
        if x.dtype not in _DTYPES:
            return f"the kernels take float32 and float64, got {_check.describe(x)}"
        if torch.is_autocast_enabled(device):
            return "autocast is on, which only torch does"
        return None

    def _lower(self, key: tuple[torch.Size, torch.dtype]) -> NativeNetwork | str:
        """The network for samples of a shape and dtype, lowered if it is not yet; or why it cannot be."""
        networks = self._found.get(key, [])
        for network in reversed(networks):
            if network.holds():
                return network
        modes = self._task.mode()
        refused = self._refused.get(key)
        if refused is not None and refused[1] == modes:
            return refused[0]
        try:
            network = NativeNetwork(self._task, *key)
        except NotLowered as refusal:
            remember(self._refused, key, (refusal.reason, modes), _MOST_SHAPES)
            return refusal.reason
        remember(self._found, key, [*networks, network][-_MOST_KEPT:], _MOST_SHAPES)
        self._fitting.clear()  # of networks that may have gone
        return network

    def __getstate__(self) -> dict[str, Any]:
        # Networks know their module by identity: a copy, or another process, lowers its own.
        return self.__dict__ | {
            "_found": OrderedDict(),
            "_refused": OrderedDict(),
            "_fitting": OrderedDict(),
            "again": None,
            "agains": OrderedDict(),
        }
