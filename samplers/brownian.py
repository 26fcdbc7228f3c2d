"""A Brownian path as the noise of a sampler: the same path on every grid.

The reverse SDE with noise tau,  dx = (f x - (1 + tau^2) g^2 s / 2) dt + tau g dw  backwards in time
(tau = 1: Anderson 1982; other tau: Xue 2023, SA-Solver, section 4), has s = (alpha x0 - x)/sigma^2, and
as dlam/dt = -g^2/(2 sigma^2) the part linear in x is solved by Phi = alpha exp(-(1 + tau^2) lam):

    d(x/Phi) = (...) x0 dt + dB(c),   c = exp(2 tau^2 lam)

because tau^2 g^2 dt / Phi^2 = 2 tau^2 exp(2 tau^2 lam) dlam = dc.  So B is a standard Brownian motion in
the clock c, for tau = 1 the signal-to-noise ratio alpha^2/sigma^2.  A step that is exact for constant
x0 (`ancestral`, SDE-DPM-Solver++, SA-Solver) adds

    Phi1 (B(c1) - B(c)) = sigma1 sqrt(1 - exp(-2 tau^2 (lam1 - lam))) z,   z = (B(c1) - B(c))/sqrt(c1 - c)

and on a refined grid its noise is the weighted sum of its parts'.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from samplers.grids import of_times
from scoresde.types import SDE, Noise

Keyed = Callable[[int, int], np.ndarray]  # (node, D) -> (D,) normal numbers, always the same for a node

SPAN = 32.0
"""The path lives on lam(T) .. lam(T) + 32, where sigma/alpha has fallen to 1e-14 of its start."""


def brownian(
    sde: SDE, ts: Tensor, seed: int, samples: int | Iterable[int], *, tau: float = 1.0, depth: int = 14
) -> Noise:
    """Noise whose i-th call is z_i = (B(c(ts[i+1])) - B(c(ts[i])))/sqrt(c(ts[i+1]) - c(ts[i])); for one run.

    ts:      the grid of the run, or of a part of one; a step to t = 0 has no z
    samples: how many, or which, as `Streams`: a sample is the same alone and in any batch
    tau:     > 0, the sampler's, constant along the grid
    depth:   two points of a grid must lie in different cells of 32/2^depth in lam (14: 0.002)

    B is a function of (seed, sample, tau, depth, size of a sample), whatever ts; the z_i of a grid are
    exactly independent N(0, I).  For samplers that draw once a step, and of noise tau.  Those of the
    formula above keep their strong order; so does `euler_maruyama` (1), whose own increments differ
    from these by a part that vanishes with the step.

    With U = B/sqrt(c), an Ornstein-Uhlenbeck process in log c: cells of log c are halved, the midpoint's
    normals keyed by (seed, sample, node), and in the last cell a point takes the bridge between its ends
    (a virtual Brownian tree: Li 2020, section 4).  A call keeps the upper cells of the one before and
    draws about depth + 1 - log2(32/(lam1 - lam)) times.
    """
    if not (tau > 0 and math.isfinite(tau)):
        raise ValueError(f"tau must be positive and finite, got {tau}; 1 is the reverse SDE, 0 draws no noise")
    if not 1 <= depth <= 48:
        raise ValueError(f"depth must lie in 1..48, got {depth}; 14 parts points 0.002 apart in log(alpha/sigma)")
    ts = of_times(sde, ts)
    ts = ts[:-1] if ts[-1] == 0 else ts
    lam = (sde.lam(ts) - sde.lam(ts.new_tensor(sde.T))).clamp(min=0)
    if lam[-1] >= SPAN:
        raise ValueError(
            f"the path reaches from lam(T) to lam(T) + {SPAN:.0f}; t = {float(ts[-1]):.6g} lies {float(lam[-1]):.6g} "
            "above lam(T): end the grid earlier, or at t = 0, where no noise is drawn"
        )
    same = ((lam * (2**depth / SPAN)).floor().diff() == 0).nonzero().flatten()
    if len(same):
        k = int(same[0])
        raise ValueError(
            f"ts[{k}] = {float(ts[k]):.9g} and ts[{k + 1}] = {float(ts[k + 1]):.9g} lie in one cell of the path, of "
            f"{SPAN / 2**depth:.3g} in log(alpha/sigma); take a larger depth (which is another path) or fewer steps"
        )
    streams = [keyed(seed, i) for i in _index(samples)]
    path = _path(2 * tau**2 * SPAN, depth, streams)
    log_c = 2 * tau**2 * lam  # log(c / c(T))
    step = log_c.diff()
    columns = log_c[1:], torch.exp(-0.5 * step), torch.sqrt(-torch.expm1(-step))
    rows = iter(torch.stack(columns, 1).tolist())
    first = float(log_c[0])
    before: Tensor | None = None  # U at the clock of the last call

    def noise(x: Tensor) -> Tensor:
        nonlocal before
        if len(x) != len(streams):
            raise ValueError(
                f"the path has {len(streams)} samples for a batch of {len(x)}; "
                "give samples=range(first, last) for those of this batch"
            )
        D = x[0].numel()
        if before is None:
            before = path(first, D)
        elif before.shape[1] != D:
            raise ValueError(f"the path is of samples of {before.shape[1]} numbers, this state has {D}")
        row = next(rows, None)
        if row is None:
            raise ValueError(
                f"all {len(log_c) - 1} increments of this grid are drawn; make a new brownian(...) for each run, "
                "and use it with samplers that draw once a step"
            )
        clock, fade, scale = row
        after = path(clock, D)
        z = (after - fade * before) / scale
        before = after
        return z.reshape(x.shape).to(x)

    return noise


def keyed(*key: int) -> Keyed:
    """Normal numbers by node: node n starts 2^64 n places into the stream of this key, so nodes share none."""
    bits = np.random.PCG64DXSM(np.random.SeedSequence(key[0], spawn_key=key[1:]))
    start, generator = bits.state, np.random.Generator(bits)

    def draw(node: int, D: int) -> np.ndarray:
        bits.state = start
        bits.advance(node << 64)
        return generator.standard_normal(D)

    return draw


def _index(samples: int | Iterable[int]) -> list[int]:
    index = [int(i) for i in samples] if isinstance(samples, Iterable) else list(range(samples))
    if not index or min(index) < 0:
        raise ValueError(f"give a positive number of samples, or indices >= 0; got {samples!r}")
    return index


def _path(span: float, depth: int, streams: list[Keyed]) -> Callable[[float, int], Tensor]:
    """(l, D) -> U = B(e^l) e^(-l/2), (B, D), at l in [0, span), with B(1) = 0.

    U is Ornstein-Uhlenbeck with correlation e^(-w/2) at distance w.  Given both ends of a cell,
    a from its left and b = w - a from its right:
        mean  [e^(-a/2) (1 - e^-b) U_left + e^(-b/2) (1 - e^-a) U_right] / (1 - e^-w)
        variance  (1 - e^-a) (1 - e^-b) / (1 - e^-w)
    """
    cells: list[tuple[int, Tensor, Tensor]] = []  # the cell of the last point at each level: place, ends

    def normals(node: int, D: int) -> Tensor:
        return torch.from_numpy(np.stack([draw(node, D) for draw in streams]))

    def inside(level: int, a: float, D: int) -> Tensor:
        place, left, right = cells[level]
        w = span / 2**level
        A, B, W = -math.expm1(-a), -math.expm1(a - w), -math.expm1(-w)
        mean = left * (math.exp(-0.5 * a) * B / W) + right * (math.exp(0.5 * (a - w)) * A / W)
        return mean.add_(normals(2**level + place, D), alpha=math.sqrt(A * B / W)) if A * B else mean

    def path(l: float, D: int) -> Tensor:
        if l == 0:
            return torch.zeros(len(streams), D, dtype=torch.float64)
        if not cells:
            end = normals(0, D) * math.sqrt(-math.expm1(-span))
            cells.append((0, torch.zeros_like(end), end))
        leaf = int(l / span * 2**depth)
        shared = sum(place == leaf >> (depth - k) for k, (place, *_) in enumerate(cells))
        del cells[shared:]
        for level in range(shared - 1, depth):
            _, left, right = cells[level]
            middle = inside(level, 0.5 * span / 2**level, D)
            place = leaf >> (depth - level - 1)
            cells.append((place, middle, right) if place % 2 else (place, left, middle))
        return inside(depth, l - leaf * (span / 2**depth), D)

    return path
