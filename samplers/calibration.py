"""Fit the numbers of a calibrated solver to a model.

First in closed form: the solver runs beside exact paths of the model, and a and b of each step,

    z1 = a z + sum_j b_j V_j,

are those of least squares over samples and coordinates that bring the state it has really reached to where
the exact path is; a search moves the time points.  Then all a and b together, by gradients through the
run, to where the error at the end is least (the numbers of one step act alike, so that L-BFGS alone crawls: it works
in Gauss and Newton's coordinates); above 10 steps from `angle` on a grid of `fit_grid`, too, and on with whichever
is ahead.  A step does best not by being right itself but by what the steps after it make of it
(Shaul 2024, Bespoke Non-Stationary Solvers, trains all its numbers so).
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from tqdm.auto import tqdm

from samplers import grids
from samplers.adams import adams
from samplers.angle import angle, angle_form
from samplers.calibrated import Calibration
from samplers.exponential import Nodes, nodes, scale
from samplers.fitted import bend, fit_grid, least
from scoresde.types import SDE, Score

MEMORY = 4  # values a step may use
ROUND = 40  # evaluations between two choices of the samples that count and of what the numbers are measured in
SKETCHES = 4  # sign vectors that Gauss and Newton's Hessian is estimated from
DAMPING = 1e-6  # of its largest eigenvalue is added to all
ALONE = 10  # steps up to which the closed form is the better start; above, `angle` on a fitted grid may be


def calibrate(
    score: Score,
    sde: SDE,
    x: Tensor,
    n: int,
    *,
    d: float = 0.5,
    t_end: float | None = None,
    model: str = "",
    searches: int | None = None,
    polish: int | None = None,
    teacher: int = 96,
    progress: bool = True,
) -> Calibration:
    """Fit a solver of n steps to `score` on the paths that start at x.

    x:        starting states at sde.T, (B, ...), 256 or more; a quarter is held out
    d:        the data's standard deviation
    model:    a name for the model with its guidance, asked for again when the solver is used
    searches: trials of other time points (a smooth warp of `grids.data_scale`, by Nelder-Mead); default 12 n
    polish:   evaluations of the error at the end and its gradient, by L-BFGS, default 16 n; 0 leaves the closed form.
              The score must let gradients through
    teacher:  steps of the exact paths (`angle` of order 4), good to about 1e-5 of the data

    n (searches + 3) + teacher network calls on the batch, above 10 steps 64 more; for each evaluation of `polish` 2 n,
    with n products with the network's Jacobian, and for each 40 of them 5 n with 4 n more.  Raises ValueError where
    the held-out error (95 %) is not below that of the uncalibrated solver.
    """
    if n < 1 or len(x) < 32:
        raise ValueError(f"calibration needs n >= 1 and at least 32 starting states, got n = {n}, {len(x)} states")
    B = len(x)
    held = torch.arange(B) % 4 == 3
    path = _Path(score, sde, x, d, t_end, teacher)
    base = grids.data_scale(sde, n, d=d, t_end=t_end)
    searches = 12 * n if searches is None else searches

    def errors(out: Tensor) -> Tensor:
        """Of each sample, RMS over coordinates, in data units."""
        return (out - path.end).flatten(1).square().mean(1).sqrt().double() / float(sde.alpha(base[-1]))

    plain = errors(angle(score, sde, x, base, d=d))
    # samples beside a separatrix, where paths part, would take all the weight of a square
    rows = ~held & (plain.cpu() <= torch.quantile(plain[~held].cpu(), 0.95))

    bar = tqdm(total=searches, desc="calibrating", disable=not progress)

    def objective(warp: np.ndarray) -> float:
        bar.update(1)
        ts = bend(sde, base, warp)
        if bool((ts.diff() >= 0).any()):
            return math.inf
        at = nodes(angle_form(d), sde, ts)
        return float(errors(_fit(path, at, rows)[0] * float(at.rho[-1]))[rows].square().mean().sqrt())

    warp, _ = least(objective, min(n - 1, 6), searches)
    bar.close()
    at = nodes(angle_form(d), sde, bend(sde, base, warp))
    _, a, b = _fit(path, at, rows)
    trials = 16 * n if polish is None else polish
    bar = tqdm(total=trials, desc="polishing", disable=not progress or not trials)
    a, b, left = _polished(path, at, a, b, ~held, trials if n <= ALONE else trials // 4, bar)
    if n > ALONE and trials:
        ts, order = fit_grid(score, sde, x, d=d, t_end=t_end).plan(sde, n)
        other = nodes(angle_form(d), sde, ts)
        a1, b1, left1 = _polished(path, other, *_of_angle(other, order), ~held, trials // 4, bar)
        at, a, b = (other, a1, b1) if left1 < left else (at, a, b)
        a, b, _ = _polished(path, at, a, b, ~held, trials // 2, bar)
    bar.close()
    z, V = _run(path, at, a, b)
    out = z[-1] * float(at.rho[-1])
    sizes = torch.stack(V).flatten(2).square().mean(2).sqrt().double()  # (n, B)
    low, high = sizes.amin(1), sizes.amax(1)
    margin = 0.2 * (high - low)

    def rms(e: Tensor, share: float) -> float:
        return float(e[held].sort().values[: max(1, math.ceil(share * int(held.sum())))].square().mean().sqrt())

    fitted, before = errors(out), rms(plain, 0.95)
    found = Calibration(
        at.t.tolist(),
        d,
        a,
        b,
        (low - margin).clamp(min=0).tolist(),
        (high + margin).tolist(),
        list(x.shape[1:]),
        repr(sde),
        model,
        rms(fitted, 1.0),
        rms(fitted, 0.95),
        before,
    )
    if not found.held_out95 < before:
        raise ValueError(
            f"on held-out paths the calibrated solver's error is {found.held_out95:.3g}, the uncalibrated one's "
            f"{before:.3g}: too few starting states ({B}), or steps enough to need no calibration"
        )
    return found


class _Path:
    """Paths of the flow by many steps, at any time in between."""

    def __init__(self, score: Score, sde: SDE, x: Tensor, d: float, t_end: float | None, n: int) -> None:
        self.score = score
        ts = grids.data_scale(sde, n, d=d, t_end=t_end)
        self.d, states = d, [x]
        self.start = x
        self.end = angle(score, sde, x, ts, d=d, order=4, on_step=lambda i, t, x: states.append(x))
        at = nodes(angle_form(d), sde, ts)
        self.angle = torch.atan(at.r / d)
        self.z = torch.stack([y / float(rho) for y, rho in zip(states, at.rho, strict=True)])

    def at(self, r: float) -> Tensor:
        """z at sigma/alpha = r, by the polynomial in the angle through the six nearest points."""
        th = math.atan(r / self.d)
        first = int((self.angle > th).sum()) - 3
        first = max(0, min(len(self.angle) - 6, first))
        near = self.angle[first : first + 6].tolist()
        w = [math.prod((th - q) / (p - q) for q in near if q != p) for p in near]
        return torch.einsum("k,k...->...", self.z.new_tensor(w), self.z[first : first + 6])


def _value(path: _Path, at: Nodes) -> Callable[[int, Tensor], Tensor]:
    """(i, z) -> V_i, by one network call."""
    q, factor = scale(at)

    def value(i: int, z: Tensor) -> Tensor:
        y = z * float(at.rho[i])
        return torch.add(y, path.score(y, at.t[i]), alpha=q[i] or 0.0) * float(factor[i])

    return value


def _fit(path: _Path, at: Nodes, rows: Tensor) -> tuple[Tensor, list[float], list[list[float]]]:
    """Least squares step by step, along the states really reached; z_n, a and b."""
    value = _value(path, at)
    z, a, b = path.start / float(at.rho[0]), [], []
    memory: list[Tensor] = []
    with torch.no_grad():
        for i in range(len(at.t) - 1):
            memory = [value(i, z), *memory][:MEMORY]
            known = torch.stack([z, *memory]).double()
            target = path.at(float(at.r[i + 1])).double()
            F = known[:, rows].flatten(1)
            G, g = F @ F.T, F @ (target - z.double())[rows].flatten()
            G = G + torch.diag(1e-10 * G.diagonal())
            c = torch.linalg.solve(G.cpu(), g.cpu())
            a.append(1 + float(c[0]))
            b.append(c[1:].tolist())
            z = z + torch.einsum("k,k...->...", c.to(known), known).to(z)
    return z, a, b


def _of_angle(at: Nodes, order: int) -> tuple[list[float], list[list[float]]]:
    """a and b of `angle`."""
    rows = [row for (row,) in adams(at.sde, at.t, at.form, order, correct=order, start="rise")]
    size = scale(at)[1]
    a = [row.a * float(at.rho[i] / at.rho[i + 1]) for i, row in enumerate(rows)]
    return a, [[w / float(at.rho[i + 1] * size[i - j]) for j, w in enumerate(row.b)] for i, row in enumerate(rows)]


def _run(path: _Path, at: Nodes, a: list[float], b: list[list[float]]) -> tuple[list[Tensor], list[Tensor]]:
    """The states z_0 .. z_n of a solver and its values V_0 .. V_(n-1)."""
    value = _value(path, at)
    z, V = [path.start / float(at.rho[0])], []
    with torch.no_grad():
        for i in range(len(a)):
            V.append(value(i, z[i]))
            z.append(a[i] * z[i] + sum((w * V[i - j] for j, w in enumerate(b[i])), torch.zeros_like(z[i])))
    return z, V


def _polished(
    path: _Path, at: Nodes, a: list[float], b: list[list[float]], fitting: Tensor, trials: int, bar: tqdm
) -> tuple[list[float], list[list[float]], float]:
    """a and b that make log sum |z_n - exact|^2 least over the 95 % of `fitting` with the smallest error, and that log.

    By the adjoint, l_n the gradient at the end, with one product with the score's Jacobian a step:

        d/da_i = l_(i+1) . z_i,   d/db_ij = l_(i+1) . V_(i-j),   g_i = sum_j b_(i+j)j l_(i+j+1),
        l_i = a_i l_(i+1) + (dV_i/dz_i)' g_i

    L-BFGS moves theta + W phi, in which Gauss and Newton's Hessian is about 1: with J = dz_n/dtheta,

        J'J = E H,   H = sum over samples of (J'e)(J'e)', e = +-1 at random,   W W' = (sum |z_n - exact|^2 / 2) H^-1
    """
    n, sizes = len(a), [1 + len(w) for w in b]
    value = _value(path, at)
    theta = np.concatenate([[p, *w] for p, w in zip(a, b, strict=True)])
    end = path.end / float(at.rho[-1])
    keep = math.ceil(0.95 * int(fitting.sum()))
    random = torch.Generator().manual_seed(0)

    def numbers(theta: np.ndarray) -> tuple[list[float], list[list[float]]]:
        parts = np.split(theta, np.cumsum(sizes)[:-1])
        return [float(p[0]) for p in parts], [p[1:].tolist() for p in parts]

    def wrong(z: Tensor) -> Tensor:
        return (z - end).flatten(1).square().sum(1).double()

    def slopes(theta: np.ndarray, z: list[Tensor], V: list[Tensor], ahead: Tensor) -> np.ndarray:
        """ahead . dz_n/dtheta of each sample, (P, B)."""
        a, b = numbers(theta)
        g = [torch.zeros_like(end) for _ in range(n)]
        found: list[Tensor] = []
        for i in reversed(range(n)):
            used = [*[V[i - j] for j in reversed(range(len(b[i])))], z[i]]
            found += [(ahead * v).flatten(1).sum(1, dtype=torch.float64) for v in used]
            for j, w in enumerate(b[i]):
                g[i - j] += w * ahead
            ahead = a[i] * ahead + torch.func.vjp(partial(value, i), z[i])[1](g[i])[0]
        return torch.stack(found[::-1]).cpu().numpy()

    def objective(phi: np.ndarray, W: np.ndarray, kept: Tensor) -> tuple[float, np.ndarray]:
        bar.update(1)
        moved = theta + W @ phi
        z, V = _run(path, at, *numbers(moved))
        total = float(wrong(z[-1])[kept].sum())
        if not 0 < total < math.inf:
            return math.inf, np.zeros_like(phi)
        ahead = torch.zeros_like(end)
        ahead[kept] = 2 / total * (z[-1] - end)[kept]
        return math.log(total), slopes(moved, z, V, ahead).sum(1) @ W

    last = math.inf
    for _ in range(math.ceil(trials / ROUND)):
        z, V = _run(path, at, *numbers(theta))
        errors = wrong(z[-1])
        kept = errors.masked_fill(~fitting.to(errors.device), math.inf).argsort()[:keep]
        total = float(errors[kept].sum())
        if not 0 < total < math.inf:
            break
        H = np.zeros((len(theta), len(theta)))
        for _ in range(SKETCHES):
            signs = torch.zeros_like(end)
            signs[kept] = (2.0 * torch.randint(2, end[kept].shape, generator=random) - 1).to(end)
            J = slopes(theta, z, V, signs)
            H += J @ J.T / SKETCHES
        unit = np.sqrt(H.diagonal().clip(np.finfo(float).tiny))
        curve, mode = np.linalg.eigh(H / unit / unit[:, None])
        W = math.sqrt(total / 2) * mode / np.sqrt(curve.clip(0) + DAMPING * curve[-1]) / unit[:, None]
        options = {"maxfun": ROUND, "maxcor": ROUND, "ftol": 1e-12, "gtol": 1e-12}
        found = minimize(objective, np.zeros_like(theta), (W, kept), "L-BFGS-B", jac=True, options=options)
        theta, before, last = theta + W @ found.x, last, float(found.fun)
        if before - last < 0.01:
            break
    return *numbers(theta), last
