"""Exponential integrators in one formula: the weights behind every multistep and singlestep sampler here.

With r = sigma/alpha, a scale d of the data and rho = alpha sqrt(d^2 + r^2), the reverse process

    dx = [f x - (1 + tau^2)/2 g^2 s] dt + tau g dw

(tau = 0: the probability flow, tau = 1: Anderson's reverse SDE) is solved exactly for N(0, d^2) data;
what remains is the integral of the residual V = (r/rho) (x + rho^2 s), read as a polynomial in a
variable u(r) through known values V_j:

    x1 = rho1 (E x/rho + (1 + tau^2) sum_j W_j V_j) + rho1 sqrt(1 - E^2) z,
    W_j = int_r1^r (rho1/alpha1 / sqrt(d^2 + r'^2))^(tau^2) L_j(u(r')) dr' / (d^2 + r'^2),
    E = (sqrt(d^2 + r1^2) / sqrt(d^2 + r^2))^(tau^2)

d = 0:      V = x0, "data prediction"   (Lu 2022b, DPM-Solver++; Xue 2023, SA-Solver, eq. 14)
d = inf:    V = -eps, "noise prediction", x/alpha with dr   (Lu 2022; Zhang & Chen 2022, DEIS)
0 < d < inf: V is v-prediction for data of deviation d, and dr/(d^2 + r^2) = d(angle)/d with
            angle = atan(r/d): smooth at both ends of the noise range.

The integrals are Gauss-Legendre sums in log r, exact to rounding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scoresde.types import SDE

GAUSS_LEGENDRE = tuple(torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(16))
Variable = Callable[[SDE, Tensor], Tensor]  # (sde, r) -> u, monotone in r


def log_snr(sde: SDE, r: Tensor) -> Tensor:
    """u = lam = -log r: the variable of DPM-Solver, UniPC, SA-Solver."""
    return -torch.log(r)


def level(sde: SDE, r: Tensor) -> Tensor:
    """u = r: the variable of linear multistep in sigma and of DEIS's rho-AB."""
    return r


def time(sde: SDE, r: Tensor) -> Tensor:
    """u = t: the variable of DEIS's t-AB."""
    return sde.time(-torch.log(r))


def bounded(c: float) -> Variable:
    """u = r/(r + c): level r below c, like 1 - c/r above it."""
    return lambda sde, r: r / (r + c)


@dataclass(frozen=True)
class Form:
    """What is integrated exactly (d), in which variable the rest is a polynomial (u), how much noise (tau)."""

    d: float = 0.0
    u: Variable = log_snr

    def __post_init__(self) -> None:
        if not self.d >= 0:
            raise ValueError(f"the data's scale d must be >= 0 (0 x0-form, inf eps-form), got {self.d}")


@dataclass(frozen=True, eq=False)
class Nodes:
    """A form at points r (n,) of an SDE: all that steps between them need."""

    form: Form
    sde: SDE
    t: Tensor
    r: Tensor
    rho: Tensor

    def span(self, r: Tensor) -> Tensor:
        """sqrt(d^2 + r^2), 1 for d = inf."""
        return torch.ones_like(r) if math.isinf(self.form.d) else torch.hypot(r, torch.full_like(r, self.form.d))


def nodes(form: Form, sde: SDE, t: Tensor) -> Nodes:
    alpha = sde.alpha(t)
    r = torch.where(sde.sigma(t) == 0, 0.0, torch.exp(-sde.lam(t)))
    made = Nodes(form, sde, t, r, alpha)
    return Nodes(form, sde, t, r, alpha * made.span(r))


def scale(at: Nodes) -> tuple[list[float | None], Tensor]:
    """q of m = x + q s for each point, and V = scale m."""
    if math.isinf(at.form.d):
        return [None] * len(at.t), at.r * at.rho  # V = -eps = sigma s
    q = (at.rho**2).tolist()
    return list(q), at.r / at.rho


def weights(
    at: Nodes, start: Tensor, end: Tensor, known: Tensor, tau: Tensor | float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, c) of x1 = a x + sum_j b_j V_j + c z for n steps at once.

    start, end: indices into the points, (n,);  known: indices of the values V_j, (n, K);  tau: () or (n,)
    A step to r = 0 uses the first of `known` alone where u or V do not reach r = 0.
    """
    tau = torch.as_tensor(tau, dtype=torch.float64).expand(len(start))
    r, r1 = at.r[start], at.r[end]
    rho, rho1 = at.rho[start], at.rho[end]
    w, w1 = at.span(r), at.span(r1)
    power, noisy = tau**2, bool((tau != 0).any())
    if math.isinf(at.form.d):
        E, c = torch.ones_like(r), rho1 * tau * torch.sqrt((r - r1) * (r + r1))
    else:
        E = (w1 / w) ** power
        c = rho1 * torch.sqrt(-torch.expm1(2 * power * torch.log(w1 / w)))

    def density(r: Tensor) -> Tensor:
        w = at.span(r)
        return r / w**2 * ((w1[:, None] / w) ** power[:, None] if noisy else 1.0)

    W = integrals(at, r, r1, known, density)
    b = (rho1 * (1 + power))[:, None] * W
    zero = r1 == 0
    if bool(zero.any()) and (at.form.d == 0 or not bool(torch.isfinite(at.form.u(at.sde, r1[zero])).all())):
        first = torch.zeros_like(b)
        if at.form.d == 0:
            first[:, 0] = at.sde.alpha(at.t[end])
        else:
            first[:, :1] = (rho1 * (1 + power))[:, None] * integrals(at, r, r1, known[:, :1], density)
        b = torch.where(zero[:, None], first, b)
        c = torch.where(zero, c if at.form.d else 0.0, c)
    return rho1 / rho * E, b, c


def integrals(at: Nodes, r: Tensor, r1: Tensor, known: Tensor, density: Callable[[Tensor], Tensor]) -> Tensor:
    """int_r1^r L_j(u(r')) density(r') dr'/r', (..., n, K); Gauss-Legendre on panels of log r no longer than 2.

    density maps (n, G) to (..., n, G), row by row.  r1 = 0 is read as r e^-40.
    """
    bottom = torch.where(r1 > 0, r1, r * math.exp(-40.0))
    length = torch.log(r / bottom)[:, None]
    panels = max(1, math.ceil(float(length.max()) / 2))
    x, gl = GAUSS_LEGENDRE
    part = ((torch.arange(panels, dtype=torch.float64)[:, None] + (x + 1) / 2) / panels).flatten()
    rg = r[:, None] * torch.exp(-length * part)  # (n, G)
    measure = length * (gl / 2 / panels).repeat(panels) * density(rg)
    ug, uj = at.form.u(at.sde, rg), at.form.u(at.sde, at.r[known])  # (n, G), (n, K)
    K = known.shape[1]
    out = []
    for j in range(K):
        basis = measure
        for k in range(K):
            if k != j:
                basis = basis * (ug - uj[:, k, None]) / (uj[:, j] - uj[:, k])[:, None]
        out.append(basis.sum(-1))
    return torch.stack(out, -1)
