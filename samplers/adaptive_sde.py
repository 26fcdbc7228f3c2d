"""An adaptive solver of the reverse SDE, with its own steps for each sample."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from samplers.brownian import Keyed, keyed
from samplers.loop import check, checked, integrate
from scoresde.flow import radius
from scoresde.types import SDE, Hook, Noise, Score, like

FIRST = 0.25  # the first step tried, in log(sigma/alpha)
DEEPEST = 40  # halvings of a step of ts
MOST = 100_000  # attempts in a step of ts

Cell = tuple[int, int, Tensor]  # level k, place p, dw (D,): the path's increment from p to p + 1 parts of 2^k


def gotta_go_fast(
    score: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    *,
    rtol: float = 0.02,
    atol: float = 0.0078,
    noise: Noise = torch.randn_like,
    on_step: Hook | Sequence[Hook] = (),
    grad: bool = False,
) -> Tensor:
    """The reverse SDE between the points of ts, in steps of each sample's own   (Jolicoeur-Martineau 2021, alg. 1).

    With R^2 = alpha^2 + sigma^2, y = x/R and u = log(sigma/alpha) running down,

        dy = F du + q dw,   F = (sigma^2/R) (2 s + y/R),   q = sqrt(2) sigma/R
        y' = y + h F(y, u) + q(u) w                             Euler-Maruyama
        y'' = (y' + y + h F(y', u - h) + q(u - h) w)/2          improved Euler, the same w
        E = RMS of (y' - y'') / max(atol, rtol max(|y'|, |y'_before|))

    y'' is taken where E <= 1, and the next h is 0.9 h E^-0.9 (at least 0.05 h).  The paper solves in t and x,
    where VE's g^2 spans 7 decades; here F and q are bounded for every SDE.

    rtol, atol: of each sample; atol = 0.0078 is a grey level of data in [-1, 1].  One of them infinite:
                every step of ts is taken whole
    noise:      drawn once a step of ts: z is the path's increment over it, w = sqrt(u - u1) z
    x, ts, on_step, grad as `euler_maruyama`; ts ends above 0.  Use a two-point grid unless hooks should
    see more.

    The paper's program draws anew after a rejection, so that small noise passes more often than large.
    Here the path is there before the steps: z is halved where a step needs it, by Brownian bridges whose
    normals are keyed by z (Gaines & Lyons 1997), and h is the largest such part not above the one wanted.
    So the path depends on a sample's z alone, not on the tolerance, and the solution tends to the path's.
    A sample is the same alone and in any batch; a finished one waits with h = 0.

    Whole steps have weak order 2 and take 2N network calls; an adaptive run takes two for each attempt of its
    slowest sample, less one where no sample of the batch moved.
    """
    if not (rtol >= 0 and atol > 0):
        raise ValueError(f"rtol must be >= 0 and atol > 0, got {rtol} and {atol}; the paper's are 0.02 and 0.0078")
    check(sde, x, ts, to_zero=False)
    us, radii = -sde.lam(ts), radius(sde, ts).tolist()
    roots = (us[:-1] - us[1:]).sqrt().tolist()
    wanted = [FIRST] * len(x)
    before = x / radii[0]

    def drift(y: Tensor, u: Tensor) -> Tensor:
        t = sde.time(-u)
        if t.ndim:
            t = t.to(y.device, torch.float32 if y.device.type == "mps" else torch.float64)
        R = radius(sde, t)
        s = checked(score(y * like(R, y), t), y)
        return like(sde.sigma(t) ** 2 / R, y) * (2 * s + y / like(R, y))

    def attempt(y: Tensor, u: Tensor, h: Tensor, w: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """y' and y'', with k = F(y, u)."""
        q, q1 = (like(math.sqrt(2) / torch.hypot(torch.exp(-v), torch.ones_like(v)), y) for v in (u, u - h))
        euler = y + like(h, y) * k + q * w
        return euler, 0.5 * (euler + y + like(h, y) * drift(euler, u - h) + q1 * w)

    def whole(i: int, x: Tensor) -> Tensor:
        y, h = x / radii[i], us[i] - us[i + 1]
        w = noise(x) * roots[i]
        return attempt(y, us[i], h, w, drift(y, us[i]))[1] * radii[i + 1]

    def adaptive(i: int, x: Tensor) -> Tensor:
        nonlocal before
        y, u, span = x / radii[i], float(us[i]), float(us[i] - us[i + 1])
        z = noise(x).detach().flatten(1).cpu()
        streams = [_stream(row, i) for row in z]
        ahead: list[list[Cell]] = [[(0, 0, math.sqrt(span) * row.double())] for row in z]
        done: Cell = (0, 1, torch.zeros(z.shape[1], dtype=torch.float64))
        k: Tensor | None = None
        for _ in range(MOST):
            for b, cells in enumerate(ahead):
                if cells and not _halve(cells, span, wanted[b], streams[b]):
                    raise FloatingPointError(
                        f"sample {b} needs steps below 2^-{DEEPEST} of the one from t = {float(ts[i]):.6g} to "
                        f"{float(ts[i + 1]):.6g}: the score is not finite or not smooth there, or rtol = {rtol:.1g}, "
                        f"atol = {atol:.1g} lie below the rounding; loosen them"
                    )
            now = [cells[-1] if cells else done for cells in ahead]
            lengths = [span / 2**level if cells else 0.0 for (level, *_), cells in zip(now, ahead, strict=True)]
            h = torch.tensor(lengths, dtype=torch.float64)
            at = torch.tensor([u - span * place / 2**level for level, place, _ in now], dtype=torch.float64)
            w = torch.stack([dw for *_, dw in now]).reshape(y.shape).to(y)
            k = drift(y, at) if k is None else k
            euler, y1 = attempt(y, at, h, w, k)
            scale = torch.maximum(euler.abs(), before.abs()).mul(rtol).clamp(min=atol)
            E = torch.stack([row.square().mean().sqrt() for row in ((euler - y1) / scale).detach().flatten(1)]).tolist()
            taken = [bool(cells) and e <= 1 for cells, e in zip(ahead, E, strict=True)]
            for b, cells in enumerate(ahead):
                if cells:
                    factor = 0.9 * max(E[b], 1e-9) ** -0.9 if math.isfinite(E[b]) else 0.0
                    wanted[b] = lengths[b] * max(factor, 0.05)
                if taken[b]:
                    cells.pop()
            if any(taken):
                move = like(torch.tensor(taken, device=y.device), y).bool()
                y, before, k = torch.where(move, y1, y), torch.where(move, euler, before).detach(), None
            if not any(ahead):
                return y * radii[i + 1]
        raise FloatingPointError(f"no end after {MOST} attempts at rtol = {rtol:.1g}, atol = {atol:.1g}; loosen them")

    step = whole if math.isinf(rtol) or math.isinf(atol) else adaptive
    return integrate(step, sde, x, ts, on_step=on_step, grad=grad, to_zero=False)


def _stream(z: Tensor, i: int) -> Keyed:
    """The bridges' normals of the path whose increment over step i is z."""
    return keyed(int.from_bytes(hashlib.blake2b(z.numpy().tobytes(), digest_size=16).digest()), i)


def _halve(cells: list[Cell], span: float, wanted: float, normals: Keyed) -> bool:
    """Halve the cell that comes next until it is not longer than wanted; False below the deepest level.

    Over a cell of length h with increment dw the left half's is dw/2 + sqrt(h)/2 n, n ~ N(0, I).
    """
    while span / 2 ** cells[-1][0] > wanted * (1 + 1e-9):
        level, place, dw = cells.pop()
        if level == DEEPEST:
            return False
        left = 0.5 * dw + 0.5 * math.sqrt(span / 2**level) * torch.from_numpy(normals(2**level + place, len(dw)))
        cells += [(level + 1, 2 * place + 1, dw - left), (level + 1, 2 * place, left)]
    return True
