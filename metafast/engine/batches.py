"""Inner steps that see a part of the support set each, and where backpropagation through them is cut."""

from __future__ import annotations

from torch import Tensor


def check_batch(batch: int | None, support: str, samples: int) -> None:
    """Refuse a support set that is no whole number of batches."""
    if batch is not None and samples % batch != 0:
        raise ValueError(f"support_batch: expected a divisor of the {samples} samples a task in {support}, got {batch}")


def support_of(x: Tensor, y: Tensor, k: int, batch: int | None, dim: int = 0) -> tuple[Tensor, Tensor]:
    """The samples that step k sees, of x and y with samples along ``dim``: batch number k, round and round."""
    if batch is None:
        return x, y
    first = k * batch % x.shape[dim]
    return x.narrow(dim, first, batch), y.narrow(dim, first, batch)


def cuts(truncate: int | None, k: int) -> bool:
    """Whether step k, which leads from phi_k, takes phi_k and s_k for constants: k = n, 2n, ..."""
    return truncate is not None and k > 0 and k % truncate == 0
