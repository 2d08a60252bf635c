"""Argument checks: every message names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def describe(value: object) -> str:
    """What came, in words short enough for an error message."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, (int, float, bool, str, type(None))):
        return repr(value)
    return f"a {type(value).__name__}"


def integer(name: str, value: Any, *, minimum: int) -> int:
    """``value`` as an int of at least ``minimum``; a bool is not an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int of at least {minimum}, got {describe(value)}")
    if value < minimum:
        raise ValueError(f"{name}: expected an int of at least {minimum}, got {value}")
    return value


def number(name: str, value: Any, *, minimum: float | None = None) -> float:
    """``value`` as a finite float, at least ``minimum`` where one is given."""
    wanted = "a finite number" if minimum is None else f"a finite number of at least {minimum:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {wanted}, got {describe(value)}")
    try:
        result = float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected {wanted}, got an int that no float holds") from None
    if not math.isfinite(result) or (minimum is not None and result < minimum):
        raise ValueError(f"{name}: expected {wanted}, got {value}")
    return result


def flag(name: str, value: Any) -> bool:
    """``value`` if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {describe(value)}")
    return value


def choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """``value`` if it is one of ``choices``."""
    names = list(choices)
    wanted = "one of " + ", ".join(repr(c) for c in names)
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected {wanted}, got {describe(value)}")
    if value not in names:
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")
    return value


def tensor(name: str, value: Any) -> Tensor:
    """``value`` if it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(value)}")
    return value


def module(name: str, value: Any) -> torch.nn.Module:
    """``value`` if it is a module."""
    if not isinstance(value, torch.nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got {describe(value)}")
    return value


def finite(name: str, value: Tensor) -> None:
    """Refuse NaN and infinity."""
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise ValueError(f"{name}: expected finite values, got {bad} NaN or infinite of {value.numel()}")


def like(name: str, value: Tensor, *, dtype: torch.dtype, device: torch.device, owner: str) -> None:
    """Refuse another dtype or device than the ``owner``'s."""
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, that of {owner}, got {describe(value)}")
    if value.is_floating_point() and value.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, that of {owner}, got {describe(value)}")


def gradients_are_made() -> None:
    """RuntimeError in torch.inference_mode, where nothing can be added to ``.grad``, not even by enable_grad."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("accumulate_grad: torch.inference_mode makes no gradients; expected a call outside of it")
