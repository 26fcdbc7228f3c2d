"""Time grids: (n+1,) float64, from sde.T down to t_end, n steps asked = n steps run.

With r = sigma/alpha the noise level relative to the data, r = exp(-lam).
`strength` in (0, 1] is for image-to-image: of a grid of n/strength steps only the last n remain,
so the run starts at ts[0] < T; noise the image to there with `perturb`.
`to_zero` ends the grid at t = 0 instead of t_end, for samplers that never call the score there.

`linspace`, `leading`, `trailing` and `sections` are grids of whole labels of a table (`DiscreteVP`):
one label fewer than points `to_zero`, else as many; where they start and end is their definition.
`of_times` and `of_levels` make a grid of any list.  Every grid decreases strictly, or is refused.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate

import torch
from scipy.special import betaincinv
from torch import Tensor

from scoresde.sde import DiscreteVP
from scoresde.types import SDE, Noise, like, number


def uniform(sde: SDE, n: int, *, t_end: float | None = None, strength: float = 1.0, to_zero: bool = False) -> Tensor:
    """Uniform in t."""
    return _grid(sde, n, t_end, strength, to_zero, lambda u, T, e: T + u * (e - T))


def quadratic(sde: SDE, n: int, *, t_end: float | None = None, strength: float = 1.0, to_zero: bool = False) -> Tensor:
    """Uniform in sqrt(t), denser near the data   (Song 2021, DDIM, appendix D.2)."""
    return _grid(sde, n, t_end, strength, to_zero, lambda u, T, e: (T.sqrt() + u * (e.sqrt() - T.sqrt())) ** 2)


def cosine(sde: SDE, n: int, *, t_end: float | None = None, strength: float = 1.0, to_zero: bool = False) -> Tensor:
    """Uniform in the angle atan(r): the noise levels of alpha = cos, sigma = sin at uniform times.

    Nichol 2021, eq. 17 with s = 0; the grid of least Kullback-Leibler bound of Sabour 2024 (Align Your
    Steps), section 3, for data of deviation 1.
    """

    def points(u: Tensor, T: Tensor, e: Tensor) -> Tensor:
        angle, end = torch.atan2(sde.sigma(T), sde.alpha(T)), torch.atan2(sde.sigma(e), sde.alpha(e))
        return sde.time(-torch.log(torch.tan(angle + u * (end - angle))))

    return _grid(sde, n, t_end, strength, to_zero, points)


def log_snr(sde: SDE, n: int, *, t_end: float | None = None, strength: float = 1.0, to_zero: bool = False) -> Tensor:
    """Uniform in lam = log(alpha/sigma)   (Lu 2022)."""

    def points(u: Tensor, T: Tensor, e: Tensor) -> Tensor:
        return sde.time(sde.lam(T) + u * (sde.lam(e) - sde.lam(T)))

    return _grid(sde, n, t_end, strength, to_zero, points)


exponential = log_snr
"""Geometric in sigma/alpha: the same grid by k-diffusion's name."""


def polyexponential(
    sde: SDE, n: int, *, rho: float = 1.0, t_end: float | None = None, strength: float = 1.0, to_zero: bool = False
) -> Tensor:
    """log(r/r_end) = u^rho log(r_T/r_end), u uniform from 1 to 0   (k-diffusion).

    rho = 1 is `exponential`; rho > 1 is denser near the data.
    """
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}; 1 is the exponential grid")

    def points(u: Tensor, T: Tensor, e: Tensor) -> Tensor:
        return sde.time(sde.lam(e) + (1 - u) ** rho * (sde.lam(T) - sde.lam(e)))

    return _grid(sde, n, t_end, strength, to_zero, points)


def karras(
    sde: SDE, n: int, *, rho: float = 7.0, t_end: float | None = None, strength: float = 1.0, to_zero: bool = False
) -> Tensor:
    """Uniform in r^(1/rho)   (Karras 2022, eq. 5).  rho -> infinity is `exponential`."""
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}; 7 is Karras's value")

    def points(u: Tensor, T: Tensor, e: Tensor) -> Tensor:
        p, q = torch.exp(-sde.lam(T) / rho), torch.exp(-sde.lam(e) / rho)
        return sde.time(-rho * torch.log(p + u * (q - p)))

    return _grid(sde, n, t_end, strength, to_zero, points)


def data_scale(
    sde: SDE, n: int, *, d: float = 0.5, t_end: float | None = None, strength: float = 1.0, to_zero: bool = False
) -> Tensor:
    """Uniform in sqrt(r/(r + 2 d)) for data of standard deviation d: `angle`'s grid where none is fitted.

    Uniform in sqrt(r) below the data's scale, uniform in alpha/sigma above it, where little happens.
    """
    if not 0 < d < math.inf:
        raise ValueError(f"d is the data's standard deviation, a positive number; got {d}")

    def points(u: Tensor, T: Tensor, e: Tensor) -> Tensor:
        p, q = (torch.sigmoid(-sde.lam(t) - math.log(2 * d)).sqrt() for t in (T, e))  # sqrt(r/(r + 2 d))
        return sde.time(-math.log(2 * d) - torch.logit((p + u * (q - p)) ** 2))

    return _grid(sde, n, t_end, strength, to_zero, points)


def beta(
    sde: SDE,
    n: int,
    *,
    a: float = 0.6,
    b: float = 0.6,
    t_end: float | None = None,
    strength: float = 1.0,
    to_zero: bool = False,
) -> Tensor:
    """Quantiles of Beta(a, b) in t: t = t_end + (T - t_end) q(u), u uniform from 1 to 0   (Lee 2024).

    a, b < 1: dense at both ends.  On `EDM` (t = sigma) it is diffusers' list of beta sigmas.
    """
    if not (a > 0 and b > 0):
        raise ValueError(f"a and b must be positive, got {a} and {b}; 0.6 is the paper's value of both")
    return _grid(sde, n, t_end, strength, to_zero, lambda u, T, e: e + (T - e) * _quantile(a, b, 1 - u))


def _quantile(a: float, b: float, p: Tensor) -> Tensor:
    return torch.from_numpy(betaincinv(a, b, p.numpy()))


def shifted(
    sde: SDE, n: int, *, shift: float = 3.0, t_end: float | None = None, strength: float = 1.0, to_zero: bool = False
) -> Tensor:
    """Flow matching's shift: uniform times v = r/(1 + r), of which every r becomes shift r   (Esser 2024, eq. 23).

    v1 = shift v / (1 + (shift - 1) v), with the ends kept: uniform in r/(r + shift), for every SDE.
    shift = 1 on `Straight` is `uniform`; shift > 1 is denser near the noise.
    """
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be positive and finite, got {shift}; 1 shifts nothing, 3 is Esser's value")

    def points(u: Tensor, T: Tensor, e: Tensor) -> Tensor:
        level = -torch.stack([sde.lam(T), sde.lam(e)]) - math.log(shift)  # log(r/shift) at the ends
        v, rest = torch.sigmoid(level), torch.sigmoid(-level)  # r/(r + shift), shift/(r + shift)
        return sde.time(torch.log(torch.lerp(rest[0], rest[1], u) / torch.lerp(v[0], v[1], u)) - math.log(shift))

    return _grid(sde, n, t_end, strength, to_zero, points)


def linspace(sde: DiscreteVP, n: int, *, strength: float = 1.0, to_zero: bool = False) -> Tensor:
    """m labels of a table, round(i (N-1)/(m-1)), i = m-1..0, halves to even   (diffusers' linspace).

    m = n labels and then t = 0 with `to_zero`, else m = n + 1.  A single label is N-1.
    """
    return _labels(sde, n, strength, to_zero, _linspace)


def leading(sde: DiscreteVP, n: int, *, strength: float = 1.0, to_zero: bool = False) -> Tensor:
    """m labels of a table, floor(i N/m), i = m-1..0   (DDIM's and diffusers' leading, iDDPM's "ddimK").

    m as in `linspace`.  Where m does not divide N the published stride floor(N/m) leaves the noisiest
    labels out (half of them at m = N/2 + 1); here any m covers the table.
    """
    return _labels(sde, n, strength, to_zero, lambda N, m: [i * N // m for i in reversed(range(m))])


def trailing(sde: DiscreteVP, n: int, *, strength: float = 1.0, to_zero: bool = False) -> Tensor:
    """m labels of a table, round(N - i N/m) - 1, i = 0..m-1, halves to even   (Lin 2024, table 2).

    m as in `linspace`.  The first label is the noisiest, the last N/m - 1.
    """
    return _labels(sde, n, strength, to_zero, lambda N, m: [_round((m - i) * N, m) - 1 for i in range(m)])


def sections(sde: DiscreteVP, counts: Sequence[int], *, to_zero: bool = False) -> Tensor:
    """Labels of a table cut in len(counts) equal sections, counts[k] labels in section k   (Nichol 2021, iDDPM).

    A section of z labels (the first N mod len(counts) have one more) gives round(j (z-1)/(c-1)),
    j = 0..c-1; c = 1 its first label.  counts runs from the data to the noise; sum(counts) steps
    `to_zero`, one fewer without.  The strides are added up in floats, as in the published program:
    their rounding decides between two labels where j (z-1)/(c-1) is a half.
    """
    N, labels, start = _table(sde), [], 0
    for k, c in enumerate(counts):
        z = N // len(counts) + (k < N % len(counts))
        if not 0 <= c <= z:
            raise ValueError(f"section {k} has {z} labels, asked for {c}; a count must lie in 0..{z}")
        strides = [(z - 1) / (c - 1)] * (c - 1) if c > 1 else []
        labels += [start + round(at) for at in accumulate(strides, initial=0.0)][:c]
        start += z
    if len(labels) < 1 + (not to_zero):
        raise ValueError(f"counts {list(counts)} give {len(labels)} labels; a grid needs two points")
    return _of_labels(sde, labels[::-1], to_zero)


def of_times(sde: SDE, times: Sequence[float] | Tensor) -> Tensor:
    """Any list of times, decreasing in (0, T]; the last may be 0.  (N+1,), N >= 1, checked."""
    ts = torch.as_tensor(times, dtype=torch.float64).detach().cpu().clone()
    if ts.ndim != 1 or len(ts) < 2:
        raise ValueError(f"a grid is a list of at least two times, got shape {tuple(ts.shape)}")
    outside = ~((ts >= 0) & (ts <= sde.T * (1 + 1e-12)))
    if bool(outside.any()):
        raise ValueError(f"times must lie in [0, T = {sde.T:.6g}], got {float(ts[outside][0]):.6g}")
    return _decreasing(ts, ts, "times")


def of_levels(sde: SDE, levels: Sequence[float] | Tensor) -> Tensor:
    """Any list of noise levels r = sigma/alpha, decreasing, at most r(T); the last may be 0.  (N+1,) times, checked."""
    r = torch.as_tensor(levels, dtype=torch.float64).detach().cpu()
    if r.ndim != 1 or len(r) < 2:
        raise ValueError(f"a grid is a list of at least two noise levels, got shape {tuple(r.shape)}")
    ends = number(sde.T), number(0.0)
    top, low = (float(sde.sigma(t) / sde.alpha(t)) for t in ends)
    outside = ~((r >= low * (1 - 1e-9)) & (r <= top * (1 + 1e-9)))
    if bool(outside.any()):
        raise ValueError(
            f"noise levels sigma/alpha must lie in [{low:.6g}, {top:.6g}] for this SDE, got {float(r[outside][0]):.6g}"
        )
    _decreasing(r, r, "noise levels")
    ts = torch.where(r > low, sde.time(-torch.log(r)).clamp(0.0, sde.T), 0.0)
    ts = torch.where(r > top * (1 - 1e-12), sde.T, ts)
    return _decreasing(ts, r, "noise levels")


def _steps(n: int, strength: float) -> int:
    """How many steps the whole grid has, of which the last n run."""
    if n < 1:
        raise ValueError(f"a grid needs at least one step, got n = {n}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1] (1 starts from pure noise), got {strength}")
    return max(n, math.ceil(n / strength - 1e-9))


def _grid(
    sde: SDE,
    n: int,
    t_end: float | None,
    strength: float,
    to_zero: bool,
    points: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """points(u, T, end) at u = 0..1, with exact ends, cut to the last n steps."""
    m = _steps(n, strength)
    T, end = number(sde.T), number(sde.t_min if t_end is None else float(t_end))
    if not 0 < end < T:
        raise ValueError(f"t_end must lie in (0, T = {sde.T:.6g}), got {float(end):.6g}; for 0 use to_zero=True")
    inner = m - 1 if to_zero else m
    u = torch.linspace(0, 1, inner + 1, dtype=torch.float64)
    ts = points(u, T, end)
    ts[0] = T
    if inner:
        ts[-1] = end
    if to_zero:
        ts = torch.cat([ts, ts.new_zeros(1)])
    return _decreasing(ts, ts, "times")[-(n + 1) :].clone()


def _labels(sde: DiscreteVP, n: int, strength: float, to_zero: bool, labels: Callable[[int, int], list[int]]) -> Tensor:
    """The points of labels(N, how many), decreasing, cut to the last n steps."""
    N, m = _table(sde), _steps(n, strength)
    m += not to_zero
    if m > N:
        raise ValueError(f"this grid has {m} labels and the table {N}, so points would coincide; take fewer steps")
    return _of_labels(sde, labels(N, m), to_zero)[-(n + 1) :].clone()


def _linspace(N: int, m: int) -> list[int]:
    return [_round(i * (N - 1), m - 1) for i in reversed(range(m))] if m > 1 else [N - 1]


def _of_labels(sde: DiscreteVP, labels: list[int], to_zero: bool) -> Tensor:
    return of_times(sde, sde.label_time(torch.tensor(labels + [-1] * to_zero, dtype=torch.float64)))


def _table(sde: DiscreteVP) -> int:
    if not isinstance(sde, DiscreteVP):
        raise ValueError(
            f"{type(sde).__name__} has no table of labels; use grids.uniform, or make one with DiscreteVP.from_betas"
        )
    return sde.N


def _round(p: int, q: int) -> int:
    """round(p/q) with halves to even, exactly; 0 where q = 0 (a single point)."""
    return round(Fraction(p, q)) if q else 0


def _decreasing(ts: Tensor, shown: Tensor, what: str) -> Tensor:
    bad = (ts.diff() >= 0).nonzero().flatten()
    if len(bad):
        k = int(bad[0])
        a, b = float(shown[k]), float(shown[k + 1])
        cure = "sort them from noise to data" if a < b else "drop the repeated ones, or take fewer steps"
        raise ValueError(f"{what} {k} and {k + 1} of the grid are {a:.9g} and {b:.9g}: they must decrease; {cure}")
    return ts


def perturb(sde: SDE, x0: Tensor, t: float | Tensor, noise: Noise = torch.randn_like) -> Tensor:
    """x_t = alpha x0 + sigma z: the start of image-to-image, with t = ts[0]   (Meng 2022, SDEdit)."""
    t = number(t)
    if not bool(((t > 0) & (t <= sde.T * (1 + 1e-9))).all()):
        raise ValueError(f"t must lie in (0, T = {sde.T:.6g}], got {float(t.min()):.6g} .. {float(t.max()):.6g}")
    return like(sde.alpha(t), x0) * x0 + like(sde.sigma(t), x0) * noise(x0)
