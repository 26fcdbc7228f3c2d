"""Dormand-Prince 5(4) with its own steps for each sample of the batch.

torchdiffeq chooses one step for the whole batch, so a sample's result moves, within the tolerance,
with its batch mates.  Here every sample has its own time and step, and evaluations are still
batched: a sample is the same alone and in any batch.  Finished samples stay in the batch (with a
step of length 0), because a score may hold things for each of its rows: labels, weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from scoresde.types import like

Field = Callable[[Tensor, Tensor], Tensor]  # (u () or (B,), y (B, ...)) -> dy/du

# Dormand & Prince 1980; Hairer, Norsett & Wanner, Solving ODEs I, table II.5.2
C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
B5 = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
E = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # order 5 minus order 4


def dormand_prince(
    rhs: Field, y: Tensor, u: float, u1: float, *, rtol: float, atol: float, max_steps: int = 10_000
) -> Tensor:
    """y(u1) from y(u), y (B, D).  Each row keeps its RMS of err / (atol + rtol max(|y|, |y1|)) under 1.

    The next step of a row is 0.9 err^(-1/5) of the last, within factors 0.2 and 5.  Six evaluations
    a step, plus one; a batch takes as many as its slowest row.
    """
    if u == u1:
        return y
    span = u1 - u
    wide = torch.float32 if y.device.type == "mps" else torch.float64  # that device has no float64
    at = torch.full((len(y),), u, dtype=wide, device=y.device)
    h = torch.full_like(at, span / 32)
    k1 = rhs(at, y)
    for _ in range(max_steps):
        ending = (u1 - at - h) / span <= 1e-12
        h = torch.where(ending, u1 - at, h)
        k = [k1]
        for c, a in zip(C, A, strict=True):
            k.append(rhs(at + c * h, y + like(h, y) * _sum(a, k)))
        y1 = y + like(h, y) * _sum(B5, k)
        at1 = torch.where(ending, u1, at + h)
        k.append(rhs(at1, y1))
        scale = atol + rtol * torch.maximum(y.abs(), y1.abs())
        err = (like(h, y) * _sum(E, k) / scale).flatten(1).square().mean(1).sqrt().to(wide)
        finite = torch.isfinite(err)
        accept = finite & (err <= 1)
        factor = torch.where(finite, 0.9 * err.clamp(min=1e-10) ** -0.2, 0.2).clamp(0.2, 5.0)
        at = torch.where(accept, at1, at)
        chosen = accept.reshape(-1, *[1] * (y.ndim - 1))
        y, k1 = torch.where(chosen, y1, y), torch.where(chosen, k[-1], k1)
        running = at != u1
        if not bool(running.any()):
            return y
        h = h * factor  # below 0.9 after a rejection
        tiny = running & (h.abs() < 1e-12 * abs(span))
        if bool(tiny.any()):
            bad = int(tiny.nonzero()[0])
            raise FloatingPointError(
                f"sample {bad} needs steps below 1e-12 of the interval at log(sigma/alpha) = {float(at[bad]):.6g}: "
                f"the score is not finite or not smooth there, or rtol = {rtol:.1g}, atol = {atol:.1g} lie below "
                f"the rounding of {str(y.dtype).removeprefix('torch.')}; loosen them or use float64"
            )
    raise FloatingPointError(f"no end after {max_steps} steps at rtol = {rtol:.1g}, atol = {atol:.1g}; loosen them")


def _sum(weights: tuple[float, ...], k: list[Tensor]) -> Tensor:
    terms = [w * v for w, v in zip(weights, k, strict=True) if w]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]
