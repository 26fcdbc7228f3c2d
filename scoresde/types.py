"""The nouns of the library as types.

Everything composes because everything is a function of a score:
`sampler(score, sde, x, ts)`, `guidance(score, ...) -> score`, `log_prob(score, sde, x)`.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Score = Callable[[Tensor, Tensor], Tensor]
"""s(x, t) = grad_x log p_t(x).  x (B, ...);  t () or (B,).  Samplers pass t as a 0-d float64
tensor on the CPU: it mixes with tensors of any device and dtype, and reading it never waits for
the device.  A score that feeds t to a network writes `t.to(x)`."""

Noise = Callable[[Tensor], Tensor]
"""z ~ N(0, I) with the shape, dtype and device of its argument (default `torch.randn_like`)."""

Hook = Callable[[int, Tensor, Tensor], Tensor | None]
"""(i, t_after, x_after) after step i.  A returned tensor replaces x."""


class SDE(Protocol):
    """Forward SDE dx = f(t) x dt + g(t) dw, so that x_t = alpha(t) x_0 + sigma(t) eps.

    t runs from 0 (data) to `T` (noise).  Every method maps a tensor of times to a tensor of the
    same shape, in closed form.  `t_min` is where grids and likelihoods end unless told otherwise;
    `prior_std` is the standard deviation of the Gaussian p_T is replaced by.
    """

    @property
    def T(self) -> float: ...
    @property
    def t_min(self) -> float: ...
    @property
    def prior_std(self) -> float: ...
    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def drift(self, t: Tensor) -> Tensor: ...
    def diffusion(self, t: Tensor) -> Tensor: ...
    def lam(self, t: Tensor) -> Tensor: ...
    def time(self, lam: Tensor) -> Tensor: ...


def like(c: Tensor, x: Tensor) -> Tensor:
    """Coefficient c, () or (B,), ready to multiply x (B, ...) of any rank, dtype and device.

    A 0-d tensor is left alone: torch treats it as a number.
    """
    if c.ndim == 0:
        return c
    return c.to(x).reshape(-1, *[1] * (x.ndim - 1))  # (B, 1, ..., 1)


def wide(x: Tensor) -> torch.dtype:
    """float64, or float32 on the device that has no other."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def number(t: float | Tensor) -> Tensor:
    """A time as a float64 tensor on the CPU, unless it is a tensor already."""
    return t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)


def instant(sde: SDE, t: float | Tensor) -> Tensor:
    """One time in (0, T] for the whole batch, () float64 on the CPU, checked."""
    t = number(t)
    if t.numel() != 1:
        raise ValueError(f"give one time for the whole batch, got shape {tuple(t.shape)}")
    t = t.detach().reshape(()).to("cpu", torch.float64)
    if not 0 < float(t) <= sde.T * (1 + 1e-9):
        raise ValueError(
            f"t must lie in (0, T = {sde.T:.6g}], got {float(t):.6g}: at t = 0 the score is singular (use sde.t_min), "
            "above T the process does not go"
        )
    return t
