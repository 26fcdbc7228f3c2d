"""The noise levels of the libraries' own schedules, between any two ends, by name."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Noise levels of N steps: alpha, sigma (N+1,) float64, sigma/alpha decreasing.

    Only azula minds their common scale, and how a schedule names its times.
    """

    alpha: Tensor
    sigma: Tensor

    @property
    def r(self) -> Tensor:
        return self.sigma / self.alpha

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.alpha) - 1


def _preserving(r: Tensor) -> Grid:
    """alpha^2 + sigma^2 = 1."""
    R = torch.hypot(torch.ones_like(r), r)
    return Grid(1 / R, r / R)


def vp_r(t: Tensor) -> Tensor:
    return torch.expm1(t * (0.1 + 0.5 * 19.9 * t)).sqrt()


def vp_t(r: float) -> float:
    B = math.log1p(r * r)
    return 2 * B / (0.1 + math.sqrt(0.01 + 2 * 19.9 * B))


def grids(r0: float, r1: float) -> dict[str, Callable[[int], Grid]]:
    """Every grid of the libraries from r0 down to r1, by name, as functions of the number of steps."""

    def ramp(n: int) -> Tensor:
        return torch.linspace(0, 1, n + 1, dtype=torch.float64)

    def ends(r: Tensor) -> Tensor:
        r = r.clone()
        r[0], r[-1] = r0, r1
        return r

    def power(rho: float) -> Callable[[int], Grid]:
        a, b = r0 ** (1 / rho), r1 ** (1 / rho)
        return lambda n: _preserving(ends((a + ramp(n) * (b - a)) ** rho))

    def poly(rho: float) -> Callable[[int], Grid]:
        a, b = math.log(r0), math.log(r1)
        return lambda n: _preserving(ends(torch.exp((1 - ramp(n)) ** rho * (a - b) + b)))

    def time(p: float) -> Callable[[int], Grid]:
        a, b = vp_t(r0) ** (1 / p), vp_t(r1) ** (1 / p)
        return lambda n: _preserving(ends(vp_r((a + ramp(n) * (b - a)) ** p)))

    def stable(n: int) -> Grid:
        """Latent diffusion's table, linear in sqrt(beta), in continuous time: uniform in t where it reaches."""
        low, high = math.sqrt(0.85), math.sqrt(12.0)

        def B(t: Tensor) -> Tensor:
            return ((low + t * (high - low)) ** 3 - low**3) / (3 * (high - low))

        def inverse(r: float) -> float:
            return float((3 * (high - low) * math.log1p(r * r) + low**3) ** (1 / 3) - low) / (high - low)

        a, b = inverse(r0), inverse(r1)
        return _preserving(ends(torch.expm1(B(a + ramp(n) * (b - a))).sqrt()))

    def beta(n: int) -> Grid:
        """Beta(0.6, 0.6) quantiles of the time."""
        from scipy.stats import beta as law

        q = torch.from_numpy(law.ppf(1 - ramp(n).numpy(), 0.6, 0.6))
        a, b = vp_t(r0), vp_t(r1)
        return _preserving(ends(vp_r(b + q * (a - b))))

    def shifted(shift: float) -> Callable[[int], Grid]:
        """Uniform in u, t = shift u/(1 + (shift - 1) u), alpha = 1 - t, sigma = t."""

        def u_of(r: float) -> float:
            t = r / (1 + r)
            return t / (shift - (shift - 1) * t)

        def make(n: int) -> Grid:
            u = u_of(r0) + ramp(n) * (u_of(r1) - u_of(r0))
            t = shift * u / (1 + (shift - 1) * u)
            r = ends(t / (1 - t))
            return Grid(1 / (1 + r), r / (1 + r))

        return make

    def cosine(n: int) -> Grid:
        """Uniform in atan r   (Nichol 2021)."""
        a, b = math.atan(r0), math.atan(r1)
        return _preserving(ends(torch.tan(a + ramp(n) * (b - a))))

    return {
        "time": time(1),
        "time_quadratic": time(2),
        "exponential": lambda n: _preserving(ends(torch.exp(math.log(r0) + ramp(n) * math.log(r1 / r0)))),
        "karras": power(7),
        "rho3": power(3),
        "rho5": power(5),
        "rho10": power(10),
        "poly0.8": poly(0.8),
        "poly1.25": poly(1.25),
        "beta": beta,
        "scaled_linear": stable,
        "cosine": cosine,
        "flow": shifted(1),
        "flow_shift3": shifted(3),
        **_azula_grids(r0, r1),
    }


def _azula_grids(r0: float, r1: float) -> dict[str, Callable[[int], Grid]]:
    """azula's schedules at uniform times, with the parameters that put the ends at r0 and r1."""
    if not importlib.util.find_spec("azula"):
        return {}
    from azula import noise

    cosine = math.sqrt((1 + r1 * r1) / (1 + r0 * r0))
    rectified = 1 / r0
    schedules = {
        "azula VE": noise.VESchedule(sigma_min=r1, sigma_max=r0),
        "azula VP": noise.VPSchedule(alpha_min=cosine, sigma_min=r1),
        "azula Cosine": noise.CosineSchedule(alpha_min=cosine, sigma_min=r1),
        "azula Rectified": noise.RectifiedSchedule(alpha_min=rectified, sigma_min=r1),
        "azula Decay": noise.DecaySchedule(alpha_min=rectified, sigma_min=r1),
    }

    def at(schedule: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[int], Grid]:
        def make(n: int) -> Grid:
            alpha, sigma = schedule(torch.linspace(1, 0, n + 1, dtype=torch.float64))
            sigma = sigma.clone()
            sigma[0], sigma[-1] = r0 * alpha[0], r1 * alpha[-1]
            return Grid(alpha, sigma)

        return make

    return {name: at(schedule) for name, schedule in schedules.items()}
