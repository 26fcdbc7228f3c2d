"""Exact log-densities by the probability flow.

Along dz/du of `scoresde.flow`, log p changes by minus the divergence, so with u from the data to T

    log p(x) = log prior(x_T) + D log(R_T / R_0) + integral of div(dz/du) du
    div(dz/du) = -sigma^2 (tr ds/dx + D / R^2)                          (Song 2021, eq. 39)

One network pass an evaluation: the score and the products with its Jacobian come from one `vjp`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scoresde.flow import EACH, radius, solve
from scoresde.noise import rademacher
from scoresde.sde import prior_log_prob
from scoresde.types import SDE, Noise, Score, instant, like, number


def log_prob(
    score: Score,
    sde: SDE,
    x: Tensor,
    *,
    t: float | Tensor | None = None,
    probes: int | None = None,
    noise: Noise = torch.randn_like,
    prior: Callable[[Tensor], Tensor] | None = None,
    method: str = EACH,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    steps: int = 64,
    chunk: int | None = None,
    grad: bool = False,
) -> Tensor:
    """log p_t(x) in nats, (B,), of the flow model with score s at the data's time t.

    x (B, ...):  data, placed at time t as they are
    t:           where the data sit, in (0, T]; default sde.t_min
    probes:      None: exact divergence, D products with the Jacobian an evaluation; n: Hutchinson's
                 estimate v'Jv from n Rademacher probes, drawn once from `noise` and kept for the
                 whole path, unbiased (Grathwohl 2019)
    chunk:       how many products are held in memory at once (default: all)
    prior:       log-density at T, x (B, ...) -> (B,); default N(0, prior_std^2 I).  What it misses of
                 the true p_T (alpha_T E[x_0], small) is an error of the model, not of the solver
    method, rtol, atol, steps: see `flow`.  Tolerances are for z and for nats per dimension; the
                 default method controls each sample by itself, so a value is the same in any batch
    grad:        keep the graph of the whole solve, to differentiate the value
    A score that jumps in t (an interval of guidance) lets the error estimate step over the jump: tighten
    the tolerance until the value stands, or use a fixed method and double its steps.
    Network calls: one an evaluation.  Samples must not see each other inside the network.
    """
    if probes is not None and probes < 1:
        raise ValueError(f"probes must be at least 1, or None for the exact divergence; got {probes}")
    if x.dtype not in (torch.float32, torch.float64) or x.ndim < 2:
        raise ValueError(
            f"x must be float32 or float64 of shape (B, ...), got {x.dtype} {tuple(x.shape)}; "
            "integer data become densities by `dequantize`, half precision by x.float(), one sample by x[None]"
        )
    t0, tT = instant(sde, sde.t_min if t is None else t), number(sde.T)
    D = x[0].numel()
    v = None if probes is None else torch.stack([rademacher(noise(x)) for _ in range(probes)])

    def rhs(u: Tensor, state: Tensor) -> Tensor:
        time = sde.time(-u)
        R, sigma2 = radius(sde, time), sde.sigma(time) ** 2
        y = state[:, :D].reshape(x.shape)
        y = y * like(R, y)
        s, trace = score_and_trace(score, y, time, v, chunk)
        dz = -like(sigma2 / R, y) * (s + y / like(R**2, y))
        dl = -(sigma2 / D) * (trace + D / R**2)  # nats per dimension
        return torch.cat([dz.flatten(1), dl.to(x)[:, None]], 1)

    start = torch.cat([(x / radius(sde, t0).to(x)).flatten(1), x.new_zeros(len(x), 1)], 1)
    scale = D * math.log(float(radius(sde, tT) / radius(sde, t0)))
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        end = solve(rhs, start, -sde.lam(t0), -sde.lam(tT), method, rtol, atol, steps)
        x_T = end[:, :D].reshape(x.shape) * radius(sde, tT).to(x)
        at_T = prior_log_prob(sde, x_T) if prior is None else prior(x_T)
        value = at_T + D * end[:, D] + scale
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).nonzero()[0])
        raise FloatingPointError(f"log_prob of sample {bad} is {float(value[bad])}; check the score with `x` there")
    return value


def score_and_trace(
    score: Score, x: Tensor, t: Tensor, probes: Tensor | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """s(x, t), (B, ...), and tr ds/dx, (B,), from one network pass.

    probes (n, B, ...): mean of v'Jv over them; None: the exact trace by D products e_i'J.
    """
    linear = torch.func.vjp(lambda y: score(y, t), x)
    s, pull = linear[0], linear[1]
    if s.shape != x.shape:
        raise ValueError(
            f"the score returned {tuple(s.shape)} for a state {tuple(x.shape)}; it must be like its argument"
        )

    def quadratic(v: Tensor) -> Tensor:  # v'Jv, (B,)
        return (pull(v)[0] * v).flatten(1).sum(1)

    if probes is None:
        D = x[0].numel()
        basis = torch.eye(D, dtype=x.dtype, device=x.device).reshape(D, 1, *x.shape[1:]).expand(D, *x.shape)
        return s, torch.vmap(quadratic, chunk_size=chunk)(basis).sum(0)
    if len(probes) == 1:
        return s, quadratic(probes[0])
    return s, torch.vmap(quadratic, chunk_size=chunk)(probes).mean(0)


def dequantize(
    k: Tensor, levels: int, low: float, high: float, noise: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Integers as densities: x = low + (k + u) w, u ~ U(0, 1), w = (high - low) / levels.

    k (B, ...) in 0..levels-1;  noise: normal, one stream per sample for repeatable draws
    """
    if k.is_floating_point() and not bool((k == k.round()).all()):
        raise ValueError("dequantize takes integer levels, got fractions; undo any rescaling first")
    if int(k.min()) < 0 or int(k.max()) >= levels:
        raise ValueError(
            f"values must lie in 0..{levels - 1} for levels = {levels}, got {int(k.min())}..{int(k.max())}"
        )
    k = k.to(torch.get_default_dtype()) if not k.is_floating_point() else k
    u = torch.rand_like(k) if noise is None else torch.special.ndtr(noise(k))
    return low + (k + u) * ((high - low) / levels)


def bits_per_dim(log_prob: Tensor, D: int, bin_width: float) -> Tensor:
    """-(log p + D log w) / (D log 2): the code length of data quantised to bins of width w.

    log_prob in nats, of the density at dequantised data;  D dimensions.  With w = (high - low)/levels
    the uniform density over [low, high] gives log2(levels).
    """
    if not bin_width > 0:
        raise ValueError(f"bin_width must be positive, got {bin_width}")
    return -(log_prob + D * math.log(bin_width)) / (D * math.log(2))
