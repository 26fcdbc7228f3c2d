"""Forward SDEs as frozen dataclasses of closed forms.

    dx = f(t) x dt + g(t) dw,   x_t = alpha(t) x_0 + sigma(t) eps,   lam = log(alpha / sigma)

`lam` is half the log signal-to-noise ratio (Kingma 2021; Lu 2022) and `time` its inverse.
For every one of them f = d log(alpha)/dt and g^2 = d sigma^2/dt - 2 f sigma^2 (Song 2021, eq. 29),
which the tests check by automatic differentiation.  `expm1` and `log1p` keep the small-t end
exact: sqrt(1 - exp(-B)) in float32 is 0.6 % off at t = 1e-5.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import softplus

from scoresde.types import SDE, Noise


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {value}; the defaults are those of the papers")


@dataclass(frozen=True)
class _LinearBeta:
    """What VP and sub-VP share: beta, its integral B, alpha and drift."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    T: float = 1.0
    t_min: float = 1e-5
    prior_std: float = 1.0

    def __post_init__(self) -> None:
        _positive(beta_min=self.beta_min, beta_max=self.beta_max, T=self.T, t_min=self.t_min)

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def B(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.B(t))

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t)


@dataclass(frozen=True)
class VP(_LinearBeta):
    """Variance preserving, beta(t) = beta_min + t (beta_max - beta_min)   (Song 2021, eq. 11, 33).

    B = beta_min t + (beta_max - beta_min) t^2 / 2
    alpha = exp(-B/2),  sigma^2 = 1 - exp(-B),  f = -beta/2,  g^2 = beta
    lam = -log(expm1(B)) / 2
    """

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self.B(t)))

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.beta(t))

    def lam(self, t: Tensor) -> Tensor:
        return -0.5 * torch.log(torch.expm1(self.B(t)))

    def time(self, lam: Tensor) -> Tensor:
        return _time_of_B(softplus(-2 * lam), self.beta_min, self.beta_max)


@dataclass(frozen=True)
class SubVP(_LinearBeta):
    """Sub-variance preserving   (Song 2021, eq. 14).

    alpha = exp(-B/2),  sigma = 1 - exp(-B),  f = -beta/2,  g^2 = beta (1 - exp(-2 B))
    lam = -log(2 sinh(B/2)),  B as in `VP`
    """

    t_min: float = 1e-3

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self.B(t))

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(-self.beta(t) * torch.expm1(-2 * self.B(t)))

    def lam(self, t: Tensor) -> Tensor:
        return -0.5 * self.B(t) - torch.log(-torch.expm1(-self.B(t)))

    def time(self, lam: Tensor) -> Tensor:
        return _time_of_B(2 * torch.asinh(0.5 * torch.exp(-lam)), self.beta_min, self.beta_max)


def _time_of_B(B: Tensor, beta_min: float, beta_max: float) -> Tensor:
    """The positive root t of beta_min t + (beta_max - beta_min) t^2 / 2 = B, without cancellation."""
    return 2 * B / (beta_min + torch.sqrt(beta_min**2 + 2 * (beta_max - beta_min) * B))


@dataclass(frozen=True)
class CosineVP:
    """Variance preserving, cosine   (Nichol & Dhariwal 2021, eq. 17, in continuous time).

    alpha = cos(h + d) / cos(h),  h = (pi/2) s/(1+s),  d = (pi/2) t/(1+s);  s = 0: alpha = cos(pi t/2)
    f = -(pi/2) tan(h + d) / (1+s),  g^2 = -2 f

    alpha(1) = 0, where a score carries nothing about x_0 (x0 = 0/0), so the process stops at
    T = 0.999, where alpha = 0.0016.
    """

    s: float = 0.008
    T: float = 0.999
    t_min: float = 1e-5
    prior_std: float = 1.0

    def __post_init__(self) -> None:
        _positive(T=self.T, t_min=self.t_min)
        if self.T >= 1:
            raise ValueError(f"T must stay below 1, where alpha = 0 and a score knows nothing of x_0; got {self.T}")
        if self.s < 0:
            raise ValueError(f"the cosine offset s must be >= 0, got {self.s}")

    @property
    def _h(self) -> float:
        return 0.5 * math.pi * self.s / (1 + self.s)

    def _d(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * t / (1 + self.s)

    def _one_minus_alpha(self, t: Tensor) -> Tensor:
        d = self._d(t)
        return 2 * torch.sin(0.5 * d) ** 2 + math.tan(self._h) * torch.sin(d)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self._h + self._d(t)) / math.cos(self._h)

    def sigma(self, t: Tensor) -> Tensor:
        m = self._one_minus_alpha(t)
        return torch.sqrt(m * (2 - m))

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi / (1 + self.s) * torch.tan(self._h + self._d(t))

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(-2 * self.drift(t))

    def lam(self, t: Tensor) -> Tensor:
        return torch.log(self.alpha(t) / self.sigma(t))

    def time(self, lam: Tensor) -> Tensor:
        alpha2, sigma2 = torch.sigmoid(2 * lam), torch.sigmoid(-2 * lam)
        sin2 = sigma2 + alpha2 * math.sin(self._h) ** 2
        angle = torch.atan2(torch.sqrt(sin2), torch.sqrt(alpha2) * math.cos(self._h))
        return (angle - self._h) * (1 + self.s) / (0.5 * math.pi)


@dataclass(frozen=True)
class VE:
    """Variance exploding, geometric   (Song 2021, eq. 30).

    alpha = 1,  sigma = sigma_min (sigma_max/sigma_min)^t,  f = 0,
    g^2 = 2 sigma^2 log(sigma_max/sigma_min).  Data at t = 0 already carry sigma_min.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    T: float = 1.0
    t_min: float = 1e-5

    def __post_init__(self) -> None:
        _positive(sigma_min=self.sigma_min, T=self.T, t_min=self.t_min)
        if not self.sigma_max > self.sigma_min:
            raise ValueError(f"sigma_max must exceed sigma_min, got {self.sigma_max} <= {self.sigma_min}")

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    @property
    def prior_std(self) -> float:
        return self.sigma_min * math.exp(self._log_ratio * self.T)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(t * self._log_ratio)

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.sqrt(2 * self._log_ratio)

    def lam(self, t: Tensor) -> Tensor:
        return -math.log(self.sigma_min) - t * self._log_ratio

    def time(self, lam: Tensor) -> Tensor:
        return (-lam - math.log(self.sigma_min)) / self._log_ratio


@dataclass(frozen=True)
class EDM:
    """Time is the noise level: alpha = 1, sigma = t, f = 0, g^2 = 2 t   (Karras 2022)."""

    T: float = 80.0
    t_min: float = 0.002

    def __post_init__(self) -> None:
        _positive(T=self.T, t_min=self.t_min)

    @property
    def prior_std(self) -> float:
        return self.T

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(2 * t)

    def lam(self, t: Tensor) -> Tensor:
        return -torch.log(t)

    def time(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam)


@dataclass(frozen=True)
class Straight:
    """The straight path of flow matching and rectified flow   (Lipman 2023; Liu 2023).

    alpha = 1 - t,  sigma = t,  f = -1/(1-t),  g^2 = 2 t/(1-t);  the velocity is eps - x0.

    Time here runs from data (0) to noise (1), as everywhere in this library.  alpha(1) = 0, where
    a score carries nothing about x_0, so the process stops at T = 1 - 2^-12.
    """

    T: float = 1 - 2**-12
    t_min: float = 1e-3

    def __post_init__(self) -> None:
        _positive(T=self.T, t_min=self.t_min)
        if self.T >= 1:
            raise ValueError(f"T must stay below 1, where alpha = 0 and a score knows nothing of x_0; got {self.T}")

    @property
    def prior_std(self) -> float:
        return self.T

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def drift(self, t: Tensor) -> Tensor:
        return -1 / (1 - t)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(2 * t / (1 - t))

    def lam(self, t: Tensor) -> Tensor:
        return torch.log((1 - t) / t)

    def time(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam)


ALPHA_FLOOR = 2.0**-15
"""Zero-terminal-SNR tables are read as ending at this alpha: where alpha = 0 the score is -x and
x0 = (x + sigma^2 s)/alpha is lost.  The prior mismatch this leaves is alpha^2 |x0|^2 / 2, about
5e-10 nats for each unit of |x0|^2."""


@dataclass(frozen=True, eq=False)
class DiscreteVP:
    """Any table of a discrete chain, made continuous   (Ho 2020, Lu 2022).

    alphas_cumprod: (N,) decreasing in [0, 1].  Label k = 0..N-1 sits at t = (k+1)/N, t = 0 is data
    (alpha = 1), and B = -2 log(alpha) is linear in between, so f and g are constant on each cell
    and lam, time are exact inverses.  `label(t) = N t - 1` is what a pretrained network expects.
    An alpha below `ALPHA_FLOOR` = 2^-15 at the end (zero terminal SNR) is read as that.
    """

    alphas_cumprod: Tensor
    T: float = 1.0
    t_min: float = field(default=0.0)
    prior_std: float = 1.0
    _B: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        table = torch.as_tensor(self.alphas_cumprod).detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) < 1:
            raise ValueError(f"alphas_cumprod must be a 1-D table, got shape {tuple(table.shape)}")
        inside = bool(((table >= 0) & (table < 1)).all())
        if not inside or bool((table.diff() >= 0).any()):
            raise ValueError(
                "alphas_cumprod must decrease strictly within [0, 1), got "
                f"{table[0]:.6g} .. {table[-1]:.6g}; from betas use DiscreteVP.from_betas(betas)"
            )
        B = -torch.log(table.clamp(min=ALPHA_FLOOR**2))
        if bool((B.diff() <= 0).any()):
            low = table[table < ALPHA_FLOOR**2]
            raise ValueError(
                f"only the last alpha may lie below the floor {ALPHA_FLOOR:.3g}, got {len(low)} alphas_cumprod of "
                f"{low[0]:.3g} and less; drop all of them but one"
            )
        object.__setattr__(self, "alphas_cumprod", table)
        object.__setattr__(self, "_B", torch.cat([torch.zeros(1, dtype=torch.float64), B]))
        if self.t_min == 0:
            object.__setattr__(self, "t_min", 1 / len(table))  # the first label

    @classmethod
    def from_betas(cls, betas: Tensor) -> "DiscreteVP":
        """alphas_cumprod = cumprod(1 - betas)   (Ho 2020, eq. 4)."""
        return cls(torch.cumprod(1 - torch.as_tensor(betas, dtype=torch.float64), 0))

    @property
    def N(self) -> int:
        return len(self.alphas_cumprod)

    def label(self, t: Tensor) -> Tensor:
        """The label of the trained network: N t - 1, not below 0; fractional between labels."""
        return (t * self.N - 1).clamp(min=0)

    def label_time(self, label: Tensor) -> Tensor:
        """The inverse of `label`: t = (label + 1) / N."""
        return (label + 1) / self.N

    def _cell(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """B at the left end of t's cell, its slope dB/dt, and where t is inside the cell in t."""
        k = (torch.ceil(t * self.N) - 1).clamp(0, self.N - 1).long()
        B = self._B.to(t)
        return B[k], (B[k + 1] - B[k]) * self.N, t - k.to(t) / self.N

    def B(self, t: Tensor) -> Tensor:
        left, slope, inside = self._cell(t)
        return left + slope * inside

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.B(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self.B(t)))

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * self._cell(t)[1]

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(self._cell(t)[1])

    def lam(self, t: Tensor) -> Tensor:
        return -0.5 * torch.log(torch.expm1(self.B(t)))

    def time(self, lam: Tensor) -> Tensor:
        B = softplus(-2 * lam)
        table = self._B.to(B)
        k = torch.searchsorted(table, B.contiguous()).clamp(1, self.N) - 1
        return (k + (B - table[k]) / (table[k + 1] - table[k])) / self.N


def linear_betas(N: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """DDPM's table, scaled so that every N covers the same noise: linspace(first, last) 1000/N (Ho 2020)."""
    if not last * 1000 / N < 1:
        raise ValueError(f"N = {N} steps give a beta of {last * 1000 / N:.3g}, which must be below 1; take more steps")
    return torch.linspace(first, last, N, dtype=torch.float64) * (1000 / N)


def scaled_linear_betas(N: int = 1000, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """Latent diffusion's table, linear in sqrt(beta)   (Rombach 2022)."""
    return torch.linspace(first**0.5, last**0.5, N, dtype=torch.float64) ** 2


def cosine_betas(N: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """beta_k = min(1 - a(k+1)/a(k), max_beta), a(k) = cos^2((pi/2)(k/N + s)/(1 + s))   (Nichol 2021)."""
    u = torch.arange(N + 1, dtype=torch.float64) / N
    a = torch.cos(0.5 * math.pi * (u + s) / (1 + s)) ** 2
    return (1 - a[1:] / a[:-1]).clamp(max=max_beta)


def prior_sample(sde: SDE, x: Tensor, noise: Noise = torch.randn_like) -> Tensor:
    """x_T ~ N(0, prior_std^2 I), shaped like x (which gives shape, dtype and device only)."""
    return noise(x).mul(sde.prior_std)


def prior_log_prob(sde: SDE, x: Tensor) -> Tensor:
    """log N(x; 0, prior_std^2 I) in nats.  x (B, ...) -> (B,)."""
    D = x[0].numel()
    return -0.5 * (x / sde.prior_std).square().flatten(1).sum(1) - D * math.log(sde.prior_std * math.sqrt(2 * math.pi))
