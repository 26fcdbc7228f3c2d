"""A Brownian path as the noise of a sampler: the same path on every grid.

The reverse SDE with noise tau,  dx = (f x - (1 + tau^2) g^2 s / 2) dt + tau g dw  backwards in time
(tau = 1: Anderson 1982; other tau: Xue 2023, SA-Solver, section 4), has s = (alpha x0 - x)/sigma^2, and
as dlam/dt = -g^2/(2 sigma^2) the part linear in x is solved by Phi = alpha exp(-(1 + tau^2) lam):

    d(x/Phi) = (...) x0 dt + dB(c),   c = exp(2 tau^2 lam)

because tau^2 g^2 dt / Phi^2 = 2 tau^2 exp(2 tau^2 lam) dlam = dc; a tau that varies has int tau^2 dlam in the
place of tau^2 lam.  So B is a standard Brownian motion in the clock c, for tau = 1 the signal-to-noise ratio
alpha^2/sigma^2.  A step that is exact for constant x0 (`ancestral`, SDE-DPM-Solver++, SA-Solver) adds

    Phi1 (B(c1) - B(c)) = sigma1 sqrt(1 - exp(-2 tau^2 (lam1 - lam))) z,   z = (B(c1) - B(c))/sqrt(c1 - c)

and on a refined grid its noise is the weighted sum of its parts'.  Where tau varies within a step, which takes
it as constant, that holds up to a part that vanishes with the step.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from samplers.adams import Tau
from samplers.grids import of_times
from scoresde.types import SDE, Noise

Keyed = Callable[[int, int], np.ndarray]  # (node, D) -> (D,) normal numbers, always the same for a node
Clock = Callable[[Tensor], Tensor]  # lam - lam(T) -> log(c/c(T))

SPAN = 32.0
"""The path lives on lam(T) .. lam(T) + 32, where sigma/alpha has fallen to 1e-14 of its start."""


def brownian(
    sde: SDE, ts: Tensor, seed: int, samples: int | Iterable[int], *, tau: float | Tau = 1.0, depth: int = 14
) -> Noise:
    """Noise whose i-th call is z_i = (B(c(ts[i+1])) - B(c(ts[i])))/sqrt(c(ts[i+1]) - c(ts[i])); for one run.

    ts:      the grid of the run, or of a part of one; a step to t = 0 has no z
    samples: how many, or which, as `Streams`: a sample is the same alone and in any batch
    tau:     the sampler's: a number > 0, or a function of r = sigma/alpha, elementwise.  Steps that start where it
             is 0 draw no noise and have no z
    depth:   two points of a grid must lie in different cells of 32/2^depth in lam (14: 0.002)

    B is a function of (seed, sample, tau, depth, size of a sample), whatever ts; the z_i of a grid are
    exactly independent N(0, I).  For samplers that draw once a step, and of noise tau.  Those of the
    formula above keep their strong order; so does `euler_maruyama` (1), whose own increments differ
    from these by a part that vanishes with the step.  A tau that varies is averaged over 2^14 cells of the path.

    With U = B/sqrt(c), an Ornstein-Uhlenbeck process in log c: cells of log c are halved, the midpoint's
    normals keyed by (seed, sample, node), and in the last cell a point takes the bridge between its ends
    (a virtual Brownian tree: Li 2020, section 4).  A call keeps the upper cells of the one before and
    draws about depth + 1 - log2(32/(lam1 - lam)) times.
    """
    if not callable(tau) and not (tau > 0 and math.isfinite(tau)):
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
    clock = _clock(sde, tau) if callable(tau) else (lambda lam: 2 * tau**2 * lam)
    step = clock(lam).diff()
    drawn = torch.ones_like(step, dtype=torch.bool) if not callable(tau) else tau(torch.exp(-sde.lam(ts[:-1]))) != 0
    still = (drawn & ~(step > 0)).nonzero().flatten()
    if len(still):
        k = int(still[0])
        raise ValueError(
            f"tau is not 0 at ts[{k}] = {float(ts[k]):.9g}, but 0 from there to ts[{k + 1}]: the path has nothing for "
            "a step that starts there; let tau be 0 at that point, too"
        )
    path = _path(clock, depth, streams)
    columns = lam[:-1], lam[1:], torch.exp(-0.5 * step), torch.sqrt(-torch.expm1(-step))
    total, rows = int(drawn.sum()), iter(torch.stack(columns, 1)[drawn].tolist())
    at, before = 0.0, torch.empty(0)  # U at the end of the last call's step

    def noise(x: Tensor) -> Tensor:
        nonlocal at, before
        if len(x) != len(streams):
            raise ValueError(
                f"the path has {len(streams)} samples for a batch of {len(x)}; "
                "give samples=range(first, last) for those of this batch"
            )
        D = x[0].numel()
        if len(before) and before.shape[1] != D:
            raise ValueError(f"the path is of samples of {before.shape[1]} numbers, this state has {D}")
        row = next(rows, None)
        if row is None:
            raise ValueError(
                f"all {total} increments of this grid are drawn; make a new brownian(...) for each run, "
                "and use it with samplers that draw once a step"
            )
        l, l1, fade, scale = row
        start = before if len(before) and at == l else path(l, D)
        at, before = l1, path(l1, D)
        return ((before - fade * start) / scale).reshape(x.shape).to(x)

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


def _clock(sde: SDE, tau: Tau) -> Clock:
    """2 int tau^2 dlam from lam(T): three Gauss points a cell of SPAN/2^14, linear within one."""
    n = 2**14
    g, w = np.polynomial.legendre.leggauss(3)
    at = (torch.arange(n, dtype=torch.float64)[:, None] + torch.from_numpy((g + 1) / 2)) * (SPAN / n)
    each = 2 * torch.as_tensor(tau(torch.exp(-at - sde.lam(at.new_tensor(sde.T))))).double() ** 2
    if not bool(torch.isfinite(each).all()):
        raise ValueError("tau is not finite somewhere below sigma/alpha of sde.T, to 1e-14 of that")
    edges = torch.cat([at.new_zeros(1), (each @ torch.from_numpy(w / 2) * (SPAN / n)).cumsum(0)])

    def clock(l: Tensor) -> Tensor:
        k = (l * (n / SPAN)).floor().long().clamp(max=n - 1)
        return edges[k] + (l * (n / SPAN) - k) * (edges[k + 1] - edges[k])

    return clock


def _index(samples: int | Iterable[int]) -> list[int]:
    index = [int(i) for i in samples] if isinstance(samples, Iterable) else list(range(samples))
    if not index or min(index) < 0:
        raise ValueError(f"give a positive number of samples, or indices >= 0; got {samples!r}")
    return index


def _path(clock: Clock, depth: int, streams: list[Keyed]) -> Callable[[float, int], Tensor]:
    """(l, D) -> U = B(c) c^(-1/2), (B, D), log c = clock(l), at l = lam - lam(T) in [0, SPAN), with B(1) = 0.

    U is Ornstein-Uhlenbeck in log c with correlation e^(-w/2) at distance w.  Given both ends of a cell,
    a from its left and b = w - a from its right:
        mean  [e^(-a/2) (1 - e^-b) U_left + e^(-b/2) (1 - e^-a) U_right] / (1 - e^-w)
        variance  (1 - e^-a) (1 - e^-b) / (1 - e^-w)
    """
    cells: list[tuple[int, Tensor, Tensor]] = []  # the cell of the last point at each level: place, ends

    def normals(node: int, D: int) -> Tensor:
        return torch.from_numpy(np.stack([draw(node, D) for draw in streams]))

    def inside(level: int, l: float, D: int) -> Tensor:
        place, left, right = cells[level]
        width = SPAN / 2**level
        first, here, last = clock(torch.tensor([place * width, l, (place + 1) * width], dtype=torch.float64)).tolist()
        a, b = here - first, last - here
        A, B, W = -math.expm1(-a), -math.expm1(-b), -math.expm1(first - last)
        if W == 0:  # the clock stands still
            return left
        mean = left * (math.exp(-0.5 * a) * B / W) + right * (math.exp(-0.5 * b) * A / W)
        return mean.add_(normals(2**level + place, D), alpha=math.sqrt(A * B / W)) if A * B else mean

    def path(l: float, D: int) -> Tensor:
        if l == 0:
            return torch.zeros(len(streams), D, dtype=torch.float64)
        if not cells:
            end = normals(0, D) * math.sqrt(-math.expm1(-float(clock(torch.tensor(SPAN, dtype=torch.float64)))))
            cells.append((0, torch.zeros_like(end), end))
        leaf = int(l / SPAN * 2**depth)
        shared = sum(place == leaf >> (depth - k) for k, (place, *_) in enumerate(cells))
        del cells[shared:]
        for level in range(shared - 1, depth):
            place, left, right = cells[level]
            middle = inside(level, (place + 0.5) * SPAN / 2**level, D)
            place = leaf >> (depth - level - 1)
            cells.append((place, middle, right) if place % 2 else (place, left, middle))
        return inside(depth, l, D)

    return path
