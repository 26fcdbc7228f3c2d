"""The variable in which log-densities are solved: u = sqrt(angle), angle = atan(r/d), r = sigma/alpha.

With rho^2 = alpha^2 d^2 + sigma^2 and z = x / rho,

    dz/du = -b (s + x/rho^2),     div dz/du = -b rho (tr ds/dx + D/rho^2),     b = 2 u sigma rho / (alpha d)
"""

import math

import torch
from torch import Tensor

from scoresde.adaptive import Field
from scoresde.divergence import score_and_trace
from scoresde.types import SDE, Score, like


class Line:
    """The variable u from t to t1 and all that depends on it; numbers in float64 on the CPU, or one for each row."""

    def __init__(self, sde: SDE, d: float, t: Tensor, t1: Tensor) -> None:
        self.sde, self.d = sde, d
        self.ends = [self._u(torch.exp(-sde.lam(s))) for s in (t, t1)]
        self.t = t, t1

    def _u(self, r: Tensor) -> Tensor:
        return torch.sqrt(torch.atan(r / self.d))

    def at(self, part: Tensor) -> Tensor:
        """u at a part in [0, 1] of the way."""
        return self.ends[0] + (self.ends[1] - self.ends[0]) * part

    @property
    def length(self) -> float:
        return float(self.ends[1] - self.ends[0])

    def rho(self, t: Tensor) -> Tensor:
        return torch.hypot(self.sde.alpha(t) * self.d, self.sde.sigma(t))

    def time(self, u: Tensor) -> Tensor:
        low, high = sorted(map(float, self.t))
        return self.sde.time(-torch.log(self.d * torch.tan(u * u))).clamp(low, high)

    def coefficients(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t, rho and b at u."""
        t = self.time(u)
        rho = self.rho(t)
        return t, rho, 2 * u * self.sde.sigma(t) * rho / (self.sde.alpha(t) * self.d)

    def velocity(self, score: Score) -> Field:
        """(u, z) -> dz/du."""

        def field(u: Tensor, z: Tensor) -> Tensor:
            t, rho, b = self.coefficients(u)
            y = z * like(rho, z)
            return -like(b, z) * (score(y, t).to(z.dtype) + y / like(rho**2, z))

        return field

    def unit(self, u: Tensor, z: Tensor, dz: Tensor) -> Tensor:
        """What an error of z is measured by, (B,): sigma/rho, the noise, or less where sigma |s| (RMS) is above 1."""
        t, rho, b = self.coefficients(u)
        noise = self.sde.sigma(t) / rho
        return noise / (noise * (like(rho / b, z) * dz + z).flatten(1).square().mean(1).sqrt()).clamp(min=1.0)

    def both(
        self, score: Score, u: Tensor, z: Tensor, v: Tensor | None, chunk: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dz/du, div dz/du (B,) and rho s, from one network pass."""
        t, rho, b = self.coefficients(u)
        y = z * like(rho, z)
        s, trace = score_and_trace(score, y, t, v, chunk)
        s = s.to(z.dtype)
        D = z[0].numel()
        return (
            -like(b, z) * (s + y / like(rho**2, z)),
            -like(b * rho, trace) * (trace + like(D / rho**2, trace)),
            like(rho, z) * s,
        )

    def widening(self, D: int) -> float:
        """D log(rho1/rho)."""
        return D * math.log(float(self.rho(self.t[1]) / self.rho(self.t[0])))
