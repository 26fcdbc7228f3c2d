"""Predictor-corrector: any one-step table as predictor, Langevin steps as corrector."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from samplers import kernels
from samplers.loop import check, checked, combiner, integrate
from scoresde.types import SDE, Hook, Noise, Score, like

Size = Callable[[int, Tensor, Tensor], Tensor | float]  # (i, score, z) -> step size e, () or (B,)
Corrector = Callable[[SDE, Tensor], Size]


def langevin(snr: float = 0.16) -> Corrector:
    """e = 2 A (snr sqrt(D) / |s|)^2, for each sample on its own   (Song 2021, algorithms 4 and 5).

    A = (alpha/alpha1)^2 of the step that follows: 1 for VE, 1 - beta for a table of betas.  The
    published |z| is replaced by its root mean square sqrt(D), and batch means by the sample's own
    norm, so that a sample does not depend on its batch mates.
    """
    _check_snr(snr)

    def sizes(sde: SDE, ts: Tensor) -> Size:
        A = (kernels.forward_kernel(sde, ts)[0] ** 2).tolist()

        def size(i: int, s: Tensor, z: Tensor) -> Tensor:
            D = s[0].numel()
            norm2 = torch.linalg.vector_norm(s.flatten(1), dim=1).square()
            return torch.where(norm2 > 0, 2 * A[i] * snr**2 * D / norm2, 0.0)  # no slope: no step

        return size

    return sizes


def annealed(snr: float = 0.16) -> Corrector:
    """e = 2 A (snr sigma)^2: annealed Langevin   (Song & Ermon 2019; Song 2021, score_sde's `ald`).

    A as in `langevin`.  The step is affine in x, so its variance is exact.
    """
    _check_snr(snr)

    def sizes(sde: SDE, ts: Tensor) -> Size:
        A = kernels.forward_kernel(sde, ts)[0] ** 2
        e = (2 * A * (snr * sde.sigma(ts[:-1])) ** 2).tolist()
        return lambda i, s, z: e[i]

    return sizes


def _check_snr(snr: float) -> None:
    if not snr > 0:
        raise ValueError(f"snr must be positive, got {snr}; 0.16 is Song's value for images")


def predictor_corrector(
    score: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    *,
    predictor: kernels.Kernel = kernels.reverse_diffusion,
    corrector: Corrector | None = None,
    n_correct: int = 1,
    noise: Noise = torch.randn_like,
    on_step: Hook | Sequence[Hook] = (),
    grad: bool = False,
) -> Tensor:
    """At each ts[i]: n_correct times x <- x + e s + sqrt(2 e) z, then the predictor to ts[i+1]   (Song 2021, alg. 1).

    predictor: a table of `samplers.kernels`, for any SDE;  corrector: `langevin(snr)` (default) or
    `annealed(snr)`
    x, ts and the rest as `euler_maruyama`.  Corrector before predictor, as in Song's programs, so
    the score is never needed at ts[-1].  N (n_correct + 1) network calls.

    n_correct = 0: the predictor's weak order.  A Langevin step of size e leaves the variance V of
    Gaussian data at V / (1 - e/(2V)), however fine the grid, so with a corrector the bias tends to
    that, not to 0: about snr^2 of V.
    """
    if n_correct < 0:
        raise ValueError(f"n_correct must be >= 0, got {n_correct}")
    check(sde, x, ts)
    size = (langevin() if corrector is None else corrector)(sde, ts)
    A, B, C = (column.tolist() for column in predictor(sde, ts))

    combine = combiner(x)

    def step(i: int, x: Tensor) -> Tensor:
        for _ in range(n_correct):
            s, z = checked(score(x, ts[i]), x), noise(x)
            e = size(i, s, z)
            if isinstance(e, Tensor):
                x = torch.addcmul(x, like(e, x), s).addcmul_(like((2 * e).sqrt(), x), z)
            else:
                x = x.add(s, alpha=e).add_(z, alpha=math.sqrt(2 * e))
        s = checked(score(x, ts[i]), x)
        x1 = combine(A[i], x, B[i], s)
        return x1.add_(noise(x), alpha=C[i]) if C[i] else x1

    return integrate(step, sde, x, ts, on_step=on_step, grad=grad)
