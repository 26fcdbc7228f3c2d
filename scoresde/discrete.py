"""Code lengths of quantised data: the mass a density gives to a cell.

Level k of `levels` over [low, high] is the cell of width w = (high - low)/levels around
c = low + (k + 1/2) w.  The model's mass there, seen at the time t where its density p_t is known, is

    P(k) = integral of p_t over alpha [c - w/2, c + w/2] = E_q[p_t(y) / q(y)]
    log P(k) >= E log 1/K sum_j p_t(y_j) / q(y_j)                         (Burda 2016, eq. 8)

for K draws y_j from any q on that cell (so alpha's log-determinant is in q); the gap is about
Var(p_t/q) / (2 K P^2).  Three q:

    uniform            what everyone reports; in many dimensions its gap is nats even at K = 20
    truncated_normal   the forward noise itself: for models trained on the cells' centres (Zheng 2023)
    fitted             exp(g v - h v^2 / 2) with slope and curvature from two calls of the score
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.noise import rademacher
from scoresde.types import SDE, Noise, Score, instant

Draw = Callable[[], tuple[Tensor, Tensor]]
Dequantizer = Callable[[Tensor, float, Noise], Draw]
"""(centres c (B, ...), width w, noise) -> draw;  draw() -> y (B, ...) at time t, log q(y) in nats (B,) float64.
Every draw takes the next numbers of `noise`, so that the first draws do not depend on how many follow."""


def dequantize(
    k: Tensor, levels: int, low: float, high: float, noise: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Integers as densities: x = low + (k + u) w, u ~ U(0, 1), w = (high - low) / levels.

    k (...) in 0..levels-1;  noise: normal, one stream per sample for repeatable draws
    x is float32 or float64 like k, of the default dtype for any other k.
    """
    k, w = _cells(k, levels, low, high)
    u = torch.rand_like(k) if noise is None else torch.special.ndtr(noise(k))
    return low + (k + u) * w


def bits_per_dim(log_prob: Tensor, D: int, bin_width: float) -> Tensor:
    """-(log p + D log w) / (D log 2): the code length of data quantised to bins of width w.

    log_prob in nats, of the density at dequantised data;  D dimensions.  With w = (high - low)/levels
    the uniform density over [low, high] gives log2(levels).
    """
    if D < 1:
        raise ValueError(f"D must be the number of dimensions of an item, at least 1, got {D}; take x[0].numel()")
    if not 0 < bin_width < math.inf:
        raise ValueError(f"bin_width must be positive, got {bin_width}; take (high - low) / levels of the data")
    return -(log_prob + D * math.log(bin_width)) / (D * math.log(2))


class Code(NamedTuple):
    """What `code_length` found.

    log_mass      (B,) nats: the bound on log P(k), float64 as all of these
    bits_per_dim  (B,): -log_mass / (D log 2), the code length
    bias          (B,) nats: by how much noise in log_prob may lift the expected bound; 0 without noise
    terms         (K, B) nats: log p_t(y_j) - log q(y_j); `importance_bound` makes the bound of fewer draws
    """

    log_mass: Tensor
    bits_per_dim: Tensor
    bias: Tensor
    terms: Tensor


def uniform(sde: SDE | None = None, t: float | Tensor | None = None) -> Dequantizer:
    """q = U(cell).  With an SDE the cells are scaled by alpha(t), t default sde.t_min; without, alpha = 1."""
    if sde is None and t is not None:
        raise ValueError(f"give the SDE along with t = {float(t):.6g}: the cells at time t are scaled by its alpha")
    alpha = 1.0 if sde is None else _noise_level(sde, t)[0]

    def cells(c: Tensor, w: float, noise: Noise) -> Draw:
        log_q = torch.full((len(c),), -c[0].numel() * math.log(alpha * w), dtype=torch.float64, device=c.device)
        return lambda: (alpha * (c + (torch.special.ndtr(noise(c)) - 0.5) * w), log_q)

    return cells


def truncated_normal(sde: SDE, t: float | Tensor | None = None) -> Dequantizer:
    """q = N(alpha c, sigma^2) cut to the cell: the forward noise at t, as far as it stays in   (Zheng 2023).

    For a model trained on the cells' centres, whose p_t peaks at alpha c with just this width; t, default
    sde.t_min, is best where the cell is some six sigma/alpha wide.  On a p_t that is smooth over a cell it is
    a poor q: one draw loses about D log(w alpha / (4.13 sigma)) nats, and more draws hardly help.
    """
    alpha, sigma = _noise_level(sde, t)

    def cells(c: Tensor, w: float, noise: Noise) -> Draw:
        zero = torch.zeros_like(c, dtype=torch.float64)
        return lambda: _draw(alpha * c, zero, zero + sigma, alpha * w, noise)

    return cells


def fitted(score: Score, sde: SDE, t: float | Tensor | None = None) -> Dequantizer:
    """q(v) ~ exp(g v - h v^2 / 2) on the cell, v = y - alpha c: log p_t to second order, in each dimension by itself.

    Two calls of the score, at alpha c +- d with d = alpha w / sqrt(12) in random directions e of signs:
    g = (s+ + s-)/2 and h = e (s- - s+)/(2 d), the curvature's diagonal as Hutchinson estimates it.  The bound
    holds whatever the score says; the better it fits log_prob, the smaller the gap (the second order of a
    separable density is exact).  h is at least 1/(4 alpha w)^2, and where the peak lies beyond an edge so much that
    it is at most 30 standard deviations away, with the slope at that edge kept: an exponential to one part in 900.
    """
    alpha = _noise_level(sde, t)[0]
    time = instant(sde, sde.t_min if t is None else t)

    def cells(c: Tensor, w: float, noise: Noise) -> Draw:
        width, e = alpha * w, rademacher(noise(c))
        d = width / math.sqrt(12) * e
        with torch.no_grad():
            up, down = score(alpha * c + d, time).double(), score(alpha * c - d, time).double()
        g, h = (up + down) / 2, (down - up) / (2 * d)
        h = h.clamp(min=1 / (4 * width) ** 2)
        edge = (g.abs() - 0.5 * h * width).clamp(min=0)  # the slope at the higher edge, where the peak lies beyond it
        h1 = torch.maximum(h, (edge / 30) ** 2)
        peak = g.sign() * ((g.abs() / h).clamp(max=0.5 * width) + edge / h1)
        return lambda: _draw(alpha * c, peak, h1**-0.5, width, noise)

    return cells


def code_length(
    log_prob: Callable[[Tensor], Tensor],
    k: Tensor,
    levels: int,
    low: float,
    high: float,
    *,
    dequantizer: Dequantizer | None = None,
    K: int = 1,
    noise: Noise = torch.randn_like,
    noise_std: float | Tensor = 0.0,
) -> Code:
    """log P(k) >= log 1/K sum_j p_t(y_j) / q(y_j), from below in expectation, rising with K to the mass itself.

    log_prob:    y (B, ...) -> nats (B,), the density at the dequantizer's time; called K times, and row i is
                 always item i, so labels and probes of each item stay in place:
                     lambda y: log_prob(score, sde, y, t=t, probes=4, noise=Streams(seed, len(y)))
    k:           integers in 0..levels-1, (B, ...); float32 and float64 keep their dtype
    low, high:   the edges of the first and the last cell
    dequantizer: `uniform()` (default), `truncated_normal(sde, t)` or `fitted(score, sde, t)`
    noise:       one stream per item makes a value repeatable, the same in any batch; more draws begin with the same
    noise_std:   nats, () or (B,): standard deviation of the error that log_prob makes anew in each draw

    A noisy log_prob (Hutchinson's trace) lifts the bound, since its error is averaged after exp (`noise_bias`).  Take
    the exact trace, the default of our `log_prob`.  Next best are the same probes in each draw, as above: what is
    common to the draws does not lift the bound, and only what the probes make of different places in a cell does
    (64-D digits mixture, 17 levels, one probe, K = 20: 0.3 nats; fresh probes in each draw: 9).  `noise_std` is
    measured by a second run that differs in the probes only: (a.terms - b.terms).std(0) / sqrt(2).

    Cost: K calls of log_prob on the batch; `fitted` adds two of the score.
    Raises ValueError for fractions, levels out of range, or low >= high; FloatingPointError for nan.
    """
    if K < 1:
        raise ValueError(f"K must be at least 1 draw, got {K}")
    if k.ndim < 2:
        raise ValueError(f"k must be (B, ...), got shape {tuple(k.shape)}; one item is k[None]")
    k, w = _cells(k, levels, low, high)
    draw = (uniform() if dequantizer is None else dequantizer)(low + (k + 0.5) * w, w, noise)
    terms = torch.stack([_term(log_prob, *draw()) for _ in range(K)])
    log_mass = importance_bound(terms, K)
    bias = noise_bias(noise_std, K).to(terms).expand(len(k))
    return Code(log_mass, bits_per_dim(log_mass, k[0].numel(), 1.0), bias, terms)


def importance_bound(terms: Tensor, K: int) -> Tensor:
    """log 1/K sum_j exp(l_j) over groups of K draws, averaged over the groups: terms (N, B) -> (B,).

    N a multiple of K.  Over the divisors of N it never falls as K rises, for every set of draws (Jensen).
    """
    if K < 1 or len(terms) % K:
        raise ValueError(f"K must divide the number of draws, {len(terms)}, got {K}")
    groups = terms.reshape(-1, K, *terms.shape[1:])
    return (groups.logsumexp(1) - math.log(K)).mean(0)


def noise_bias(std: float | Tensor, K: int) -> Tensor:
    """The most by which errors of log p that differ between the K draws lift the expected bound, in nats, like std.

        min(v (1 - 1/K)/2, sqrt(2 v log K)),  v = std^2, for Gaussian errors independent between the draws:

    the first since the mean of l(r) = log sum_j w_j exp(sqrt(r) e_j) grows at the rate v E[1 - sum_j p_j^2]/2, p_j
    the shares in the sum; the second since no sum gains more than its largest e_j.  The expected gain is never < 0.
    """
    v = torch.as_tensor(std, dtype=torch.float64) ** 2
    return torch.minimum(v * (1 - 1 / K) / 2, (2 * v * math.log(K)).sqrt())


def _term(log_prob: Callable[[Tensor], Tensor], y: Tensor, log_q: Tensor) -> Tensor:
    log_p = log_prob(y)
    if log_p.shape != log_q.shape:
        raise ValueError(f"log_prob must return nats of shape ({len(y)},), one an item, got {tuple(log_p.shape)}")
    term = log_p.to(log_q) - log_q
    bad = (term.isnan() | (term == math.inf)).nonzero()
    if len(bad):
        i = int(bad[0])
        raise FloatingPointError(
            f"item {i}: log p is {float(log_p[i])} and log q is {float(log_q[i])}; check log_prob and the score there"
        )
    return term


def _cells(k: Tensor, levels: int, low: float, high: float) -> tuple[Tensor, float]:
    """k in floating point, and the width of a cell."""
    if levels < 1 or levels != int(levels):
        raise ValueError(f"levels must be a whole number of at least 1, got {levels}; 8-bit data have 256")
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"low must lie below high, the outer edges of the cells, got {low} and {high}")
    if k.is_floating_point():
        broken = k[k != k.round()]
        if len(broken):
            raise ValueError(
                f"k must hold integer levels, got fractions such as {float(broken[0]):.6g}; undo any rescaling first"
            )
    if k.numel() and (int(k.min()) < 0 or int(k.max()) >= levels):
        raise ValueError(
            f"values must lie in 0..{levels - 1} for levels = {levels}, got {int(k.min())}..{int(k.max())}; "
            "give the real number of levels, or shift the data to start at 0"
        )
    dtype = k.dtype if k.dtype in (torch.float32, torch.float64) else torch.get_default_dtype()
    return k.to(dtype), (high - low) / levels


def _noise_level(sde: SDE, t: float | Tensor | None) -> tuple[float, float]:
    time = instant(sde, sde.t_min if t is None else t)
    return float(sde.alpha(time)), float(sde.sigma(time))


def _draw(centre: Tensor, mean: Tensor, std: Tensor, width: float, noise: Noise) -> tuple[Tensor, Tensor]:
    """y = centre + v with v from `truncated`, and log q(y), (B,)."""
    v, log_q = truncated(noise(centre), mean, std, width)
    return (centre + v).to(centre), log_q.flatten(1).sum(1)


def truncated(z: Tensor, mean: Tensor, std: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """A draw of N(mean, std^2) cut to |v| <= width/2 from normal noise z, and its log-density; elementwise, float64.

    With a, b the ends in standard deviations and M = Phi(b) - Phi(a), Phi(v) = Phi(a) + Phi(z) M; whichever of it and
    1 - Phi(v) = Phi(-b) + Phi(-z) M is smaller is inverted, so both tails are exact; the nearer end within 37 std.
    """
    a, b = (-0.5 * width - mean) / std, (0.5 * width - mean) / std
    z = z.double()
    M = torch.where(a > 0, _ndtr(-a) - _ndtr(-b), _ndtr(b) - _ndtr(a))
    below, above = _ndtr(a) + _ndtr(z) * M, _ndtr(-b) + _ndtr(-z) * M
    e = torch.where(below < above, torch.special.ndtri(below), -torch.special.ndtri(above))
    e = torch.minimum(torch.maximum(e, a), b)
    return mean + std * e, -0.5 * e**2 - torch.log(std * M) - 0.5 * math.log(2 * math.pi)


def _ndtr(z: Tensor) -> Tensor:
    """Phi(z); torch's own is (1 + erf)/2, which is 0 below -8.3."""
    return 0.5 * torch.erfc(z * -math.sqrt(0.5))
