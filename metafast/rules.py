"""Update rules U of the inner loop: phi_{k+1}, s_{k+1} = U(phi_k, g_k, s_k; psi).

A rule is a pure pair (init, step): state goes in and comes back, nothing is kept in the module but psi, its own
learnable parameters. Rules see all tasks at once, one flat parameter vector a row, (T, P).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metafast import _check
from metafast.coordinatewise import CoordinatewiseOptimizer
from metafast.engine.guard import has_hooks, hooked
from metafast.engine.layout import Layout
from metafast.lstm import LSTMOptimizer
from metafast.ops.inner_update import inner_update
from metafast.ops.lstm import MOST_LAYERS, lstm_vjp
from metafast.ops.momentum_update import momentum_update

State = tuple[Tensor, ...]
Cotangents = tuple[Tensor | None, ...]


class PlainOptimizer(NamedTuple):
    """A coordinatewise LSTM as the extension takes it.

    Attributes:
        weights: those of :class:`~metafast.LSTMOptimizer`, and after them its initial state if that is learned.
        p: range of its preprocessing.
        moves: (M,) indices of the parameters that it moves, ascending; None: all.
        size: P, of how many; None with ``moves``.
    """

    weights: tuple[Tensor, ...]
    p: float
    moves: Tensor | None
    size: int | None


class UpdateRule(nn.Module, ABC):
    """An update rule; write your own by defining the two methods with differentiable torch operations.

    Example:
        >>> import torch
        >>> class SignDescent(UpdateRule):
        ...     def init(self, params):
        ...         return ()
        ...     def step(self, params, grads, state):
        ...         return params - 0.01 * grads.sign(), state
        >>> phi, state = SignDescent().step(torch.ones(1, 2), torch.tensor([[3.0, -4.0]]), ())
        >>> phi
        tensor([[0.9900, 1.0100]])
    """

    @abstractmethod
    def init(self, params: Tensor) -> State:
        """State before the first step, for parameters (T, P); may depend on psi."""

    @abstractmethod
    def step(self, params: Tensor, grads: Tensor, state: State) -> tuple[Tensor, State]:
        """Parameters (T, P) and state after a step along grads (T, P)."""

    def vjp(
        self, params: Tensor, grads: Tensor, state: State, lam: Tensor, lam_state: Cotangents
    ) -> tuple[Cotangents, Cotangents] | None:
        """Pull the cotangents lam of the new parameters and lam_state of the new state back through one step.

        Returns:
            Cotangents of (params, grads, *state) and of the rule's parameters, None where nothing flows; or None
            instead of both where the rule has no formula of its own, and autograd goes through :meth:`step`.
        """
        return None

    def plain_rates(self, steps: int, dtype: torch.dtype) -> float | Tensor | None:
        """The rates, if the rule is phi - rate g, or phi - rate O(g, s) with O the :meth:`plain_optimizer`.

        The whole meta-step is then one native call.

        Args:
            steps: K.
            dtype: the parameters'; rates that are not learned come in it.

        Returns:
            One for all, or (1, P), or (K, P), differentiable in psi; None for any other rule.
        """
        return None

    def plain_optimizer(self) -> PlainOptimizer | None:
        """O, if the rule is phi - rate O(g, s) with one rate for all that moves; None for any other rule."""
        return None


class SGD(UpdateRule):
    """phi - lr g: the rule of MAML (Finn, Abbeel & Levine 2017).

    Args:
        lr: inner learning rate, a finite number of at least 0.
    """

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = _check.number("lr", lr, minimum=0.0)

    def init(self, params: Tensor) -> State:
        return ()

    def step(self, params: Tensor, grads: Tensor, state: State) -> tuple[Tensor, State]:
        return inner_update(params, grads, self.lr), state

    def plain_rates(self, steps: int, dtype: torch.dtype) -> float | Tensor | None:
        return self.lr if type(self) is SGD else None  # a subclass may step otherwise

    def extra_repr(self) -> str:
        return f"lr={self.lr:g}"


class PartialSGD(UpdateRule):
    """phi - lr g for some of the parameters; the others stay as they are in the inner loop and are meta-learned only.

    The last layer's alone are ANIL's (Raghu et al. 2020, arXiv:1909.09157), all but its BOIL's (Oh et al. 2021,
    arXiv:2008.08882).

    Args:
        model: the model that the rule will adapt.
        adapts: names of parameters, or of modules all of whose parameters adapt, as in ``model.named_modules()``.
        lr: inner learning rate, a finite number of at least 0.

    Raises:
        TypeError, ValueError: no names, or one that no parameter that requires gradients has.

    Example:
        >>> import metafast as mf
        >>> rule = PartialSGD(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)), adapts=["2"], lr=0.1)
        >>> rule.moves
        tensor([False, False, False, False, False, False, False, False,  True,  True,
                 True])

    Attributes:
        moves: (P,) bool, which of the parameters adapt.
    """

    moves: Tensor

    def __init__(self, model: nn.Module, adapts: Sequence[str], lr: float) -> None:
        super().__init__()
        self.register_buffer("moves", moving(model, adapts), persistent=False)
        self.adapts = tuple(adapts)
        self.lr = _check.number("lr", lr, minimum=0.0)

    def init(self, params: Tensor) -> State:
        return ()

    def step(self, params: Tensor, grads: Tensor, state: State) -> tuple[Tensor, State]:
        return inner_update(params, grads, self._rates(params.dtype)), state

    def plain_rates(self, steps: int, dtype: torch.dtype) -> float | Tensor | None:
        return self._rates(dtype).unsqueeze(0) if type(self) is PartialSGD else None

    def _rates(self, dtype: torch.dtype) -> Tensor:
        return self.lr * self.moves.to(dtype)

    def extra_repr(self) -> str:
        return f"adapts={list(self.adapts)}, lr={self.lr:g}"


def moving(model: nn.Module, adapts: Sequence[str]) -> Tensor:
    """(P,) bool, which parameters of a model are those named, or in a module that is; refuses a name of none."""
    if isinstance(adapts, str) or not isinstance(adapts, Sequence) or not adapts or not _all_strings(adapts):
        raise TypeError(f"adapts: expected names of parameters or modules, got {adapts!r}")
    layout = Layout.of(_check.module("model", model))
    moves = torch.zeros_like(layout.flatten(model).detach(), dtype=torch.bool)
    parts = moves.split(list(layout.sizes))
    for name in adapts:
        found = [part for key, part in zip(layout.names, parts) if _is_of(key, name)]
        if not found:
            raise ValueError(f"adapts: expected names among {', '.join(layout.names)} or their modules, got {name!r}")
        for part in found:
            part.fill_(True)
    for key, parameter in model.named_parameters(remove_duplicate=False):
        # A shared parameter goes by its first name alone; by another it would stay behind without a word.
        if parameter.requires_grad and key not in layout.names and any(_is_of(key, name) for name in adapts):
            first = next(own for own, p in model.named_parameters() if p is parameter)
            if not any(_is_of(first, name) for name in adapts):
                raise ValueError(f"adapts: {key!r} is the parameter {first!r} too; expected that name among them")
    return moves


def _is_of(parameter: str, name: str) -> bool:
    """Whether a parameter's qualified name is ``name``, or that of a module it is in."""
    return parameter == name or parameter.startswith(f"{name}.")


def _all_strings(names: Sequence[object]) -> bool:
    return all(isinstance(name, str) for name in names)


class Momentum(UpdateRule):
    """Heavy ball: v' = momentum v + g,  phi' = phi - lr v', from v = 0 (Polyak 1964).

    Args:
        lr: inner learning rate, a finite number of at least 0.
        momentum: a finite number of at least 0.
    """

    def __init__(self, lr: float, momentum: float = 0.9) -> None:
        super().__init__()
        self.lr = _check.number("lr", lr, minimum=0.0)
        self.momentum = _check.number("momentum", momentum, minimum=0.0)

    def init(self, params: Tensor) -> State:
        return (torch.zeros_like(params),)

    def step(self, params: Tensor, grads: Tensor, state: State) -> tuple[Tensor, State]:
        params, velocity = momentum_update(params, grads, state[0], self.lr, self.momentum)
        return params, (velocity,)

    def extra_repr(self) -> str:
        return f"lr={self.lr:g}, momentum={self.momentum:g}"


class LearnedRates(UpdateRule):
    """phi - alpha * g with a learned rate for every parameter: Meta-SGD (Li et al. 2017, arXiv:1707.09835).

    Args:
        model: the model that the rule will adapt; it decides how many rates there are, their dtype and device.
        lr: where every rate starts, a finite number of at least 0; what is learned may become negative.

    Attributes:
        rates: (P,) the learned rates alpha, in the order of the model's parameters that require gradients.

    Example:
        >>> import metafast as mf
        >>> model = nn.Linear(2, 1)
        >>> learner = mf.GradientLearner(model, LearnedRates(model, lr=0.1), steps=2, loss="mse")
        >>> learner.rule.rates.shape
        torch.Size([3])
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        flat = Layout.of(model).flatten(model)
        self.rates = nn.Parameter(torch.full_like(flat.detach(), _check.number("lr", lr, minimum=0.0)))

    def init(self, params: Tensor) -> State:
        return ()

    def step(self, params: Tensor, grads: Tensor, state: State) -> tuple[Tensor, State]:
        return inner_update(params, grads, self.rates), state

    def plain_rates(self, steps: int, dtype: torch.dtype) -> float | Tensor | None:
        return self.rates.unsqueeze(0) if type(self) is LearnedRates else None


class LayerRates(UpdateRule):
    """phi - alpha[k, l] g with a learned rate for every step k and parameter tensor l, as in MAML++.

    Reference: Antoniou, Edwards & Storkey, ICLR 2019, arXiv:1810.09502.

    Args:
        model: the model that the rule will adapt.
        steps: K, how many steps there are rates for, at least 1; a step beyond them raises a ValueError.
        lr: where every rate starts, a finite number of at least 0.

    Attributes:
        rates: (K, L) the learned rates.
    """

    tensor_of: Tensor

    def __init__(self, model: nn.Module, steps: int, lr: float) -> None:
        super().__init__()
        _check.integer("steps", steps, minimum=1)
        layout = Layout.of(model)
        first = next(iter(layout.parameters(model)))
        start = _check.number("lr", lr, minimum=0.0)
        self.rates = nn.Parameter(first.new_full((steps, len(layout.sizes)), start).detach())
        number = torch.arange(len(layout.sizes), device=first.device)
        self.register_buffer("tensor_of", number.repeat_interleave(torch.tensor(layout.sizes, device=first.device)))

    def init(self, params: Tensor) -> State:
        return (torch.zeros((), dtype=torch.int64),)

    def step(self, params: Tensor, grads: Tensor, state: State) -> tuple[Tensor, State]:
        k = int(state[0])
        if k >= self.rates.shape[0]:
            raise ValueError(f"steps: this rule has rates for {self.rates.shape[0]} steps, got another")
        return inner_update(params, grads, self.rates[k][self.tensor_of]), (state[0] + 1,)

    def plain_rates(self, steps: int, dtype: torch.dtype) -> float | Tensor | None:
        if type(self) is not LayerRates:
            return None
        if steps > self.rates.shape[0]:
            raise ValueError(f"steps: this rule has rates for {self.rates.shape[0]} steps, got {steps}")
        return self.rates[:steps, self.tensor_of] if steps > 0 else self.rates[:1, self.tensor_of]


class StepNorms(UpdateRule):
    """Batch norms' weights and biases learned for every step, instead of adapted: MAML++'s per-step normalisation.

        phi_{k+1} = values[k] for the weights and biases of batch norms, U(phi_k, g_k, s_k) for all else

    The learner's ``batch_norm="batch"`` gives each step the statistics of its own batch.

    Reference: Antoniou, Edwards & Storkey, ICLR 2019, arXiv:1810.09502, section 4 (BNWB).

    Args:
        rule: U, :class:`LayerRates` for MAML++.
        model: the model that the rule will adapt.
        steps: K, how many steps there are values for, at least 1; a step beyond them raises a ValueError.

    Attributes:
        values: (K, M) the learned weights and biases, in the order of the model's parameters; they start as these.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; a model without batch norms that have parameters.

    Example:
        >>> import metafast as mf
        >>> model = mf.models.Conv4(5, width=8)
        >>> rule = StepNorms(LayerRates(model, steps=2, lr=0.1), model, steps=2)
        >>> learner = mf.GradientLearner(model, rule, steps=2, query_weights=(0.5, 0.5))
        >>> rule.values.shape
        torch.Size([2, 64])
    """

    index: Tensor

    def __init__(self, rule: UpdateRule, model: nn.Module, steps: int) -> None:
        super().__init__()
        if not isinstance(rule, UpdateRule):
            raise TypeError(f"rule: expected a metafast.UpdateRule, got {_check.describe(rule)}")
        self.rule = rule
        _check.integer("steps", steps, minimum=1)
        layout = Layout.of(_check.module("model", model))
        norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
        names = [key for key in layout.names if key.rpartition(".")[0] in norms]
        if not names:
            raise ValueError("model: expected batch norms with parameters that require gradients, got none")
        self.register_buffer("index", moving(model, names).nonzero().squeeze(1), persistent=False)
        self.values = nn.Parameter(layout.flatten(model).detach()[self.index].repeat(steps, 1))

    def init(self, params: Tensor) -> State:
        return (torch.zeros((), dtype=torch.int64), *self.rule.init(params))

    def step(self, params: Tensor, grads: Tensor, state: State) -> tuple[Tensor, State]:
        k = int(state[0])
        if k >= self.values.shape[0]:
            raise ValueError(f"steps: this rule has values for {self.values.shape[0]} steps, got another")
        moved, carried = self.rule.step(params, grads, state[1:])
        values = self.values[k].expand(params.shape[0], -1)
        return moved.index_copy(1, self.index, values), (state[0] + 1, *carried)


class LearnedRule(UpdateRule):
    """phi - lr O(g, s; psi): the rule of LOMAML, O a learned coordinatewise optimiser.

    Args:
        optimizer: O; shared by all coordinates, tasks and steps.
        lr: factor of its output, a finite number of at least 0.
        moves: (P,) bool, which of the parameters adapt; None: all. O sees the gradients of these alone.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.
    """

    index: Tensor | None

    def __init__(self, optimizer: CoordinatewiseOptimizer, lr: float, moves: Tensor | None = None) -> None:
        super().__init__()
        if not isinstance(optimizer, CoordinatewiseOptimizer):
            raise TypeError(
                f"optimizer: expected an LSTMOptimizer or another metafast.CoordinatewiseOptimizer, "
                f"got {_check.describe(optimizer)}"
            )
        self.optimizer = optimizer
        self.lr = _check.number("lr", lr, minimum=0.0)
        self._size = None
        if moves is not None:
            if _check.tensor("moves", moves).dim() != 1 or moves.dtype != torch.bool or not bool(moves.any()):
                raise ValueError(f"moves: expected (P,) bool, not all False, got {_check.describe(moves)}")
            self._size = moves.shape[0]
        index = None if moves is None else moves.nonzero().squeeze(1)
        self.register_buffer("index", index, persistent=False)

    def init(self, params: Tensor) -> State:
        if self.index is None:
            return (self.optimizer.init(params.numel()),)
        if params.shape[1] != self._size:
            raise ValueError(f"moves: expected one for each of {params.shape[1]}, got {self._size}")
        return (self.optimizer.init(params.shape[0] * self.index.shape[0]),)

    def step(self, params: Tensor, grads: Tensor, state: State) -> tuple[Tensor, State]:
        moved, along = self._moving(params), self._moving(grads)
        updates, carried = self.optimizer(along.reshape(-1), state[0])
        moved = inner_update(moved, updates.view_as(moved), self.lr)
        return (moved if self.index is None else params.index_copy(1, self.index, moved)), (carried,)

    def vjp(
        self, params: Tensor, grads: Tensor, state: State, lam: Tensor, lam_state: Cotangents
    ) -> tuple[Cotangents, Cotangents] | None:
        optimizer = self.optimizer
        if not self._plain():
            return None
        assert isinstance(optimizer, LSTMOptimizer)
        carried = lam_state[0] if lam_state else None
        d_updates = (-self.lr * self._moving(lam)).reshape(-1)
        along = self._moving(grads)
        weights = list(optimizer.weights)
        d_along, d_state, d_weights = lstm_vjp(d_updates, carried, along.reshape(-1), state[0], weights, optimizer.p)
        d_grads = d_along.view_as(along)
        if self.index is not None:
            d_grads = torch.zeros_like(grads).index_copy(1, self.index, d_grads)
        d_psi = d_weights if optimizer.initial_state is None else (None, *d_weights)
        return (lam, d_grads, d_state), d_psi

    def _moving(self, flat: Tensor) -> Tensor:
        """The part of (T, P) that adapts."""
        return flat if self.index is None else flat.index_select(1, self.index)

    def plain_rates(self, steps: int, dtype: torch.dtype) -> float | Tensor | None:
        return None if self.plain_optimizer() is None else self.lr

    def plain_optimizer(self) -> PlainOptimizer | None:
        optimizer = self.optimizer
        if not self._plain():
            return None
        assert isinstance(optimizer, LSTMOptimizer)
        if optimizer.layers > MOST_LAYERS:
            return None
        start = () if optimizer.initial_state is None else (optimizer.initial_state,)
        return PlainOptimizer((*optimizer.weights, *start), optimizer.p, self.index, self._size)

    def _plain(self) -> bool:
        """Whether the step is what this class and LSTMOptimizer say: no subclass, no hook, no weight used twice."""
        optimizer = self.optimizer
        if type(self) is not LearnedRule or type(optimizer) is not LSTMOptimizer:
            return False
        if {"step", "init"} & self.__dict__.keys() or {"forward", "init"} & optimizer.__dict__.keys():
            return False
        mine = list(self.parameters())
        if has_hooks(optimizer) or hooked(mine):
            return False
        weights = list(optimizer.weights)
        if optimizer.initial_state is not None:
            weights.insert(0, optimizer.initial_state)
        return len(mine) == len(weights) and all(a is b for a, b in zip(mine, weights))

    def extra_repr(self) -> str:
        return f"lr={self.lr:g}" if self.index is None else f"lr={self.lr:g}, moves {self.index.shape[0]} parameters"
