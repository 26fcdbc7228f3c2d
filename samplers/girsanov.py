"""The weight of a noisy path: what one score's chain would say of a path made by another's."""

import torch
from torch import Tensor

from samplers.kernels import Kernel, ancestral
from samplers.loop import check, integrate
from scoresde.model import evaluate
from scoresde.types import SDE, Noise, Score


def girsanov(
    score: Score,
    target: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    *,
    kernel: Kernel = ancestral,
    noise: Noise = torch.randn_like,
) -> tuple[Tensor, Tensor]:
    """(x at ts[-1], log weight (B,)) of the one-step chain x1 = a x + b s + c z driven by `score`.

        log dP/dQ = sum_i [ |z|^2 - |z + (b/c)(s - s')|^2 ] / 2        s of `score` (Q), s' of `target` (P)

    the exact ratio of the two chains' densities of the path; for small steps Girsanov's
    sum_i [ -g (s - s') z sqrt(dt) - g^2 |s - s'|^2 dt / 2 ].  Averages over Q of exp(log dP/dQ) h(x) are
    averages of h over the chain of `target`, whatever the steps.  A step without noise needs s = s' there.
    Of a guided chain, `score` = cfg(cond, uncond, w), `target` = cond weighs it back to the conditional one.

    kernel: (a, b, c) of `samplers.kernels`;  x: state at ts[0], (B, ...)
    Network calls: one batch of both a step for models of one network, else two.
    """
    check(sde, x, ts)
    A, B, C = (column.tolist() for column in kernel(sde, ts))
    if min(map(abs, C)) == 0:
        k = [abs(c) for c in C].index(0.0)
        raise ValueError(
            f"step {k + 1} of {len(C)} draws no noise (it ends at t = {ts[k + 1]:.3g}), so paths of two scores are "
            "never the same there; end the grid above t = 0, or take a kernel with noise in every step"
        )
    times, log_w = ts.unbind(), x.new_zeros(len(x), dtype=torch.float64)

    def step(i: int, x: Tensor) -> Tensor:
        nonlocal log_w
        s, other = evaluate((score, target), x, times[i])
        z = noise(x)
        shifted = z + (B[i] / C[i]) * (s - other)
        log_w = log_w + 0.5 * (z.square() - shifted.square()).flatten(1).sum(1)
        return A[i] * x + B[i] * s + C[i] * z

    x1 = integrate(step, sde, x, ts)
    return x1, log_w.detach()
