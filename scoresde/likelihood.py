"""Log-densities of the probability flow: the path solved on x alone, the divergence by quadrature along it.

With r = sigma/alpha, the data's standard deviation d, rho^2 = alpha^2 d^2 + sigma^2 and z = x / rho, over

    u = sqrt(angle),   angle = atan(r/d)

the flow and the change of its log-density are                          (Song 2021, eq. 13 and 39)

    dz/du = -b (s + x/rho^2),                      b = 2 u sigma rho / (alpha d)
    log p_t1(x1) - log p_t(x) = -int div du - D log(rho1/rho),   div = -b rho (tr ds/dx + D/rho^2)

N(0, d^2) data stand still.  The angle ends where nothing happens, at both ends of the noise range, and its root
gives the little noise, where networks are rough, its share of nodes.

Ways to solve it (`method`):

    apart      each sample's own steps of Bogacki and Shampine's pair, chosen by x alone, then the divergence at
               Fejer's nodes, interior Chebyshev points, 7, 15, 31, ... of them, each set holding the last: one network
               pass a node, until the value stands.  Errors of path and trace are apart, and fresh probes cost nothing
    multistep  n network calls in all, on Chebyshev points: the pass that moves the path also gives the divergence
    curve      the same n calls, for a score that is the true one.  Then, by the continuity equation, along any
               curve z(u), not only the flow's,

                   log p_t1(x1) - log p_t(x) = int [ s.(dz/du - v) rho - div ] du - D log(rho1/rho)

               (v the flow's velocity), so the curve may be Euler's, which is smooth, and the sum is spectrally
               accurate.  For a network the value differs from that of its flow by as much as its score differs
               from a gradient: a test of a score, not the likelihood of a model
    dopri5, rk4, each:tsit5, ...   path and divergence together, by torchdiffeq or `scoresde.adaptive`, over log r
               and R^2 = alpha^2 + sigma^2: the classical way
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.adaptive import MARGIN, PAIRS, Field, rows_of, solve_each
from scoresde.divergence import Probes, score_and_trace, spread
from scoresde.divergence import probes as make
from scoresde.exact import Mixture
from scoresde.flow import ADAPTIVE, FIXED, OWN_STEPS, radius, solve
from scoresde.line import Line
from scoresde.quadrature import adams, clenshaw_curtis, derivative, fejer
from scoresde.sde import prior_log_prob
from scoresde.types import SDE, Noise, Score, instant, like, number, wide

APART, MULTISTEP, CURVE = "apart", "multistep", "curve"
ROWS = 256  # of one network call that several nodes share
GUARD = (
    0.03  # part of the last change that stays in doubt, however little the next one was: two sums may agree by chance
)
METHODS = (APART, MULTISTEP, CURVE, *OWN_STEPS, *ADAPTIVE, *FIXED)
LEVELS = (7, 15, 31, 63, 127)
Prior = Mixture | Callable[[Tensor], Tensor]
"""x_T (B, ...) -> log-density (B,), or data whose p_T is the prior: `gaussian_of(data)`, or an exact target."""


class Change(NamedTuple):
    """Along the flow from (x, t) to (x1, t1)."""

    x: Tensor  # x1, (B, ...)
    log_p: Tensor  # log p_t1(x1) - log p_t(x), nats, (B,)
    error: Tensor  # what the quadrature may have left, nats, (B,); NaN where the method does not tell
    nodes: Tensor  # divergences evaluated for each sample, (B,)


def log_prob(
    score: Score, sde: SDE, x: Tensor, *, t: float | Tensor | None = None, prior: Prior | None = None, **how: Any
) -> Tensor:
    """log p_t(x) in nats, (B,), of the flow model with score s at the data's time t.

    x (B, ...):  data, placed at time t as they are
    t:           where the data sit, in (0, T]; default sde.t_min
    prior:       default N(0, prior_std^2 I).  What it misses of the true p_T is an error of the model, not of the
                 solver: a few 1e-3 nats a dimension for VE, which `gaussian_of(data)` takes away
    how:         the arguments of `change`
    A guided score has a flow and so a density, which is this one; it is in general not the density the
    rule is named after, nor the noised version of anything.
    """
    T = number(sde.T)
    end = change(score, sde, x, sde.t_min if t is None else t, T, **how)
    with torch.set_grad_enabled(bool(how.get("grad")) and torch.is_grad_enabled()):
        return _finite(_at_prior(sde, end.x, prior) - end.log_p)


def sample_log_prob(
    score: Score, sde: SDE, x: Tensor, *, t: float | Tensor | None = None, prior: Prior | None = None, **how: Any
) -> tuple[Tensor, Tensor]:
    """Samples and their log p_t in one pass: x (B, ...) at T, drawn from the prior -> (x at t, log p_t(x) (B,)).

    Arguments as `log_prob`; the sum is the one `log_prob` makes on the way back.
    """
    end = change(score, sde, x, number(sde.T), sde.t_min if t is None else t, **how)
    with torch.set_grad_enabled(bool(how.get("grad")) and torch.is_grad_enabled()):
        return end.x, _finite(_at_prior(sde, x, prior) + end.log_p)


def change(
    score: Score,
    sde: SDE,
    x: Tensor,
    t: float | Tensor,
    t1: float | Tensor,
    *,
    method: str = APART,
    tol: float = 1e-4,
    steps: int = 32,
    nodes: int | None = None,
    d: float = 0.5,
    probes: int | None = None,
    covariance: Mixture | None = None,
    kind: str = "hadamard",
    fresh: bool | None = None,
    noise: Noise = torch.randn_like,
    chunk: int | None = None,
    grad: bool | str = False,
    params: Iterable[Tensor] = (),
) -> Change:
    """From (x, t) along the flow to t1, and the change of the log-density; in either direction.

    method:  see the module
    tol:     for adaptive methods, nats per dimension.  apart: the quadrature stops there, and so much may each step of
             the path move log p: RMS err(x) max(1/sigma, |s|), since an error off the data's manifold grows as fast
             as the noise.  The others: on z and on log p
    steps:   network calls of multistep and curve; steps of torchdiffeq's fixed methods, uniform in log(sigma/alpha)
    nodes:   of method apart: the most that are tried, one of 7, 15, 31, 63, 127 (the default).  With probes, whose
             noise no stopping rule may look at, so many are taken (default 31)
    d:       the data's standard deviation, of methods apart, multistep and curve.  A wrong d costs evaluations, not
             convergence
    probes:  None: exact divergence, D products with the Jacobian a node; n: Hutchinson's estimate from n probes
             (`scoresde.divergence.probes`: kind, fresh), drawn from `noise`
    covariance: a Gaussian with the data's, as `gaussian_of(data)`: then `probes` is the number for all nodes together,
             spread by the noise that such data would make at each: quieter than evenly while they are fewer than about
             2 D (with more, rows that complete each other want even numbers) and the data have a covariance that tells
             of them (not six textures on top of each other).  Methods apart, multistep and curve
    fresh:   other probes at each evaluation; the default wherever evaluations are fixed beforehand, refused elsewhere
    chunk:   how many products are held in memory at once
    grad:    True: keep the graph of the whole solve.  "adjoint": backwards by a second solve, which holds one state
             only (Chen 2018); by torchdiffeq's methods, for gradients in x and in `params`
    A score that jumps in t (an interval of guidance) lets an error estimate step over the jump: tighten tol until
    the value stands, or use a fixed method and double its steps.
    Network calls: one an evaluation.  With scores that have `rows` (`scoresde.adaptive`), samples that are done leave
    the batch, and several nodes of few samples make one call.  Samples must not see each other inside the network.
    """
    t, t1 = instant(sde, t), instant(sde, t1)
    _check(x, method, tol, steps, nodes, d, probes, fresh, grad)
    settled = method in (APART, MULTISTEP, CURVE, *FIXED)
    each: int | list[int] | None = probes
    if covariance is not None:
        if probes is None or method not in (APART, MULTISTEP, CURVE):
            raise ValueError("covariance spreads a number of probes over the nodes of apart, multistep or curve")
        each = _shares(
            Line(sde, d, t, t1), method, nodes or LEVELS[2] if method == APART else steps, probes, covariance
        )
    draw = None if each is None else make(kind, each, x, noise, settled if fresh is None else fresh)
    with torch.set_grad_enabled(bool(grad) and torch.is_grad_enabled()):
        if method == APART:
            return _apart(score, Line(sde, d, t, t1), x, tol, nodes, draw, chunk, isinstance(each, list))
        if method in (MULTISTEP, CURVE):
            return _multistep(score, Line(sde, d, t, t1), x, steps, method == CURVE, draw, chunk)
        adjoint = tuple(params) if grad == "adjoint" else None
        return _joint(score, sde, x, t, t1, method, tol, steps, draw, chunk, adjoint)


def _apart(
    score: Score,
    line: Line,
    x: Tensor,
    tol: float,
    most: int | None,
    draw: Probes | None,
    chunk: int | None,
    uneven: bool,
) -> Change:
    most = most or (LEVELS[-1] if draw is None else LEVELS[2])
    u = line.at(fejer(most)[0])
    B, D, real = len(x), x[0].numel(), wide(x)

    def rows(index: Tensor) -> Field | None:
        some = rows_of(score, index)
        return None if some is None else line.velocity(some)

    z, at = solve_each(
        line.velocity(score),
        x / line.rho(line.t[0]).to(x),
        *map(float, line.ends),
        rtol=0.0,
        atol=tol / MARGIN,
        rows=rows,
        nodes=u.to(x.device, real),
        scale=line.unit,
        pair=PAIRS["bosh3"],
    )
    div = x.new_zeros(most, B, dtype=real)
    value, before = x.new_full((B,), math.nan, dtype=real), x.new_full((B,), math.nan, dtype=real)
    error, used = value.clone(), torch.zeros(B, dtype=torch.long, device=x.device)
    running = torch.arange(B, device=x.device)
    levels = [n for n in LEVELS if n <= most] if draw is None else [most]
    for n in levels:
        step = (most + 1) // (n + 1)
        new = range(step - 1, most, step if n == levels[0] else 2 * step)
        found = _divergences(score, line, u, at, list(new), running, draw, chunk, uneven)
        div = div.index_put((torch.tensor(list(new), device=x.device)[:, None], running), found.to(real))
        inner = slice(step - 1, most, step)
        w = fejer(n)[1].to(div) * line.length
        sum_ = (w[:, None] * div[inner][:, running]).sum(0)
        change, last = (sum_ - value[running]).abs(), (value[running] - before[running]).abs()
        left = change * torch.where(last > change, change / last, 1.0)  # errors fall at least as they fell
        left = torch.fmax(left, GUARD * last)
        before = before.index_put((running,), value[running])
        value = value.index_put((running,), sum_)
        error, used[running] = error.index_put((running,), left.detach()), n
        running = running[~(left <= tol * D)]
        if len(running) == 0:
            break
    return Change(z * line.rho(line.t[1]).to(x), (-value - line.widening(D)).to(x), error.to(x), used)


def _divergences(
    score: Score,
    line: Line,
    u: Tensor,
    at: Tensor,
    nodes: list[int],
    running: Tensor,
    draw: Probes | None,
    chunk: int | None,
    uneven: bool,
) -> Tensor:
    """div dz/du at these nodes for the running samples, (len(nodes), len(running)).

    One network call a node; several nodes in one where the score has `rows`, samples are few and probes alike.
    """
    some = rows_of(score, running)
    if some is None:
        whole = [line.both(score, u[k], at[k], None if draw is None else draw(k), chunk)[1] for k in nodes]
        return torch.stack(whole)[:, running]
    out, many, A = [], 1 if uneven else max(1, ROWS // len(running)), len(running)
    for first in range(0, len(nodes), many):
        group = nodes[first : first + many]
        here = rows_of(score, running.repeat(len(group))) if len(group) > 1 else some
        v = None if draw is None else torch.cat([draw(k)[:, running] for k in group], 1)
        z = torch.cat([at[k, running] for k in group])
        when = u[group].to(z.device, wide(z)).repeat_interleave(A) if len(group) > 1 else u[group[0]]
        assert here is not None
        out.append(line.both(here, when, z, v, chunk)[1].reshape(len(group), A))
    return torch.cat(out)


def _multistep(
    score: Score, line: Line, x: Tensor, n: int, curve: bool, draw: Probes | None, chunk: int | None
) -> Change:
    """n calls on Chebyshev points, ends included.  Adams-Bashforth moves, Adams-Moulton corrects by the next call."""
    part, weight = clenshaw_curtis(n)
    u, w = line.at(part), (weight * line.length).tolist()
    order = 1 if curve else 2 if n <= 24 else 3
    ahead, back = adams(u, order)
    z = base = x / line.rho(line.t[0]).to(x)
    path: list[Tensor] = []
    speeds: list[Tensor] = []
    pulls: list[Tensor] = []
    sums: list[Tensor] = []
    for i in range(n):
        v, div, s = line.both(score, u[i], z, None if draw is None else draw(i), chunk)
        path.append(z)
        speeds.insert(0, v)
        pulls.append(s)
        sums.append(w[i] * div)
        if i and not curve:
            base = base + sum(a * f for a, f in zip(back[i - 1], speeds, strict=False))
        elif i:
            base = z
        if i < n - 1:
            z = base + sum(a * f for a, f in zip(ahead[i], speeds, strict=False))
            if not curve:
                del speeds[order - 1 :]
    total = torch.stack(sums).sum(0)
    if curve:
        slope = torch.einsum("ij,j...->i...", derivative(u).to(x), torch.stack(path))
        off = slope - torch.stack(speeds[::-1])
        pull = (torch.stack(pulls) * off).flatten(2).sum(2)
        total = total - (torch.tensor(w).to(x)[:, None] * pull).sum(0)
    log_p = -total - line.widening(x[0].numel())
    return Change(z * line.rho(line.t[1]).to(x), log_p, torch.full_like(log_p, math.nan), _all(log_p, n))


def _joint(
    score: Score,
    sde: SDE,
    x: Tensor,
    t: Tensor,
    t1: Tensor,
    method: str,
    tol: float,
    steps: int,
    draw: Probes | None,
    chunk: int | None,
    adjoint: tuple[Tensor, ...] | None,
) -> Change:
    """z = x/R and log p over log r, R^2 = alpha^2 + sigma^2, in one system."""
    D, count = x[0].numel(), 0

    def rhs(u: Tensor, state: Tensor) -> Tensor:
        nonlocal count
        time = sde.time(-u)
        R, sigma2 = radius(sde, time), sde.sigma(time) ** 2
        y = state[:, :D].reshape(x.shape)
        y = y * like(R, y)
        s, trace = score_and_trace(score, y, time, None if draw is None else draw(count), chunk)
        count += 1
        dz = -like(sigma2 / R, y) * (s + y / like(R**2, y))
        dl = -(sigma2 / D).to(x) * (trace + (D / R**2).to(x))  # nats per dimension
        return torch.cat([dz.flatten(1), dl[:, None]], 1)

    start = torch.cat([(x / radius(sde, t).to(x)).flatten(1), x.new_zeros(len(x), 1)], 1)
    end = solve(rhs, start, -sde.lam(t), -sde.lam(t1), method, tol, tol, steps, adjoint=adjoint)
    log_p = -D * (end[:, D] + math.log(float(radius(sde, t1) / radius(sde, t))))
    x1 = end[:, :D].reshape(x.shape) * radius(sde, t1).to(x)
    return Change(x1, log_p, torch.full_like(log_p, math.nan), _all(log_p, count))


def _shares(line: Line, method: str, n: int, total: int, like: Mixture) -> list[int]:
    """Probes for each of the method's n nodes, `total` in all."""
    part, weight = fejer(n) if method == APART else clenshaw_curtis(n)
    t, rho, b = line.coefficients(line.at(part))
    return spread(total, weight * b * rho, line.sde.alpha(t), line.sde.sigma(t), like)


def _all(like: Tensor, n: int) -> Tensor:
    return torch.full(like.shape, n, dtype=torch.long, device=like.device)


def _at_prior(sde: SDE, x: Tensor, prior: Prior | None) -> Tensor:
    if prior is None:
        return prior_log_prob(sde, x)
    return prior.log_prob(x, sde, number(sde.T)) if isinstance(prior, Mixture) else prior(x)


def _finite(value: Tensor) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).nonzero()[0])
        raise FloatingPointError(f"log p of sample {bad} is {float(value[bad])}; check the score with `x` there")
    return value


def _check(
    x: Tensor,
    method: str,
    tol: float,
    steps: int,
    nodes: int | None,
    d: float,
    probes: int | None,
    fresh: bool | None,
    grad: bool | str,
) -> None:
    if x.dtype not in (torch.float32, torch.float64) or x.ndim < 2:
        raise ValueError(
            f"x must be float32 or float64 of shape (B, ...), got {x.dtype} {tuple(x.shape)}; "
            "integer data become densities by `dequantize`, half precision by x.float(), one sample by x[None]"
        )
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if not 0 < tol < 1:
        raise ValueError(f"tol must lie in (0, 1), got {tol}")
    if steps < (2 if method in (MULTISTEP, CURVE) else 1):
        raise ValueError(f"{method} needs more steps, got {steps}: at least 1, and 2 for multistep and curve")
    if nodes is not None and nodes not in LEVELS:
        raise ValueError(
            f"nodes must be one of {', '.join(map(str, LEVELS))}, so that each set holds the last; got {nodes}"
        )
    if not 0 < d < math.inf:
        raise ValueError(f"d is the data's standard deviation, a positive number; got {d}")
    if probes is not None and probes < 1:
        raise ValueError(f"probes must be at least 1, or None for the exact divergence; got {probes}")
    if fresh and method in (*OWN_STEPS, *ADAPTIVE):
        raise ValueError(
            f"{method} chooses its steps by the log-density and would follow fresh noise; use method='apart'"
        )
    if grad not in (False, True, "adjoint"):
        raise ValueError(f"grad is False, True or 'adjoint', got {grad!r}")
    if grad == "adjoint" and method not in (*ADAPTIVE, *FIXED):
        raise ValueError(f"the adjoint is torchdiffeq's: give method='dopri5' or another of its own, not {method!r}")
