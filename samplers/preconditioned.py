"""`angle` with the covariance of the data in place of one standard deviation: the Gaussian part is exact."""

from collections.abc import Sequence

import torch
from torch import Tensor

from samplers.angle import angle_form, order_for
from samplers.exponential import Nodes, integrals, nodes
from samplers.loop import check, checked, integrate
from scoresde.types import SDE, Hook, Score


def preconditioned(
    score: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    *,
    mean: Tensor,
    eig: Tensor,
    basis: Tensor | None = None,
    order: int | None = None,
    on_step: Hook | Sequence[Hook] = (),
    grad: bool = False,
) -> Tensor:
    """In the eigenvectors of the data's covariance, each coordinate by `angle` with its own d = sqrt(eigenvalue).

        w = U'(x - alpha mean),   rho_k^2 = alpha^2 c_k + sigma^2,   V_k = (r/rho_k)(w_k + rho_k^2 (U's)_k),
        w1_k = rho1_k (w_k/rho_k + int V_k dr/(c_k + r^2)),   predicted and corrected as `angle`

    mean:  shaped like a sample;  eig: c > 0, (D,);  basis: U, (D, D), its eigenvectors as columns;
           None: the covariance is diagonal
    order: as `angle`, but 1 up to 6 steps
    x, ts, on_step, grad as `euler_maruyama`.  Deterministic; exact for N(mean, U diag(c) U') data in one step.
    Order 3, N network calls, and two products with U each.  A sample is the same alone and in a batch only to
    rounding, because of those.  The closed-form relative of the statistics of DPM-Solver-v3   (Zheng 2023).
    """
    D = x[0].numel()
    if mean.shape != x.shape[1:] or eig.shape != (D,) or (basis is not None and basis.shape != (D, D)):
        raise ValueError(
            f"for samples {tuple(x.shape[1:])} mean must be of that shape, eig ({D},) and basis ({D}, {D}); got "
            f"{tuple(mean.shape)}, {tuple(eig.shape)}, {None if basis is None else tuple(basis.shape)}"
        )
    if not bool((eig > 0).all()):
        raise ValueError(f"the eigenvalues must be positive, got {float(eig.min()):.3g}; add the smallest variance met")
    check(sde, x, ts, to_zero=False)
    N = len(ts) - 1
    p = (1 if N <= 6 else order_for(N)) if order is None else order
    if p < 1:
        raise ValueError(f"order must be at least 1, got {p}")
    c = eig.detach().to("cpu", torch.float64)
    at = nodes(angle_form(float(c.mean().sqrt())), sde, ts)
    rho = sde.alpha(ts)[:, None] * torch.sqrt(c + at.r[:, None] ** 2)  # (N + 1, D)
    predict = [_weights(at, c, i, i - torch.arange(min(p, i + 1))) for i in range(N)]
    correct = [_weights(at, c, i, i + 1 - torch.arange(min(p, i + 1) + 1)) for i in range(N - 1)]
    U = None if basis is None else basis.to(x)
    m, alpha = mean.to(x), sde.alpha(ts).tolist()
    rho, V_scale = rho.to(x), (at.r[:, None] / rho).to(x)
    predict, correct = [w.to(x) for w in predict], [w.to(x) for w in correct]
    memory: list[Tensor] = []

    def rotate(y: Tensor) -> Tensor:
        return y.flatten(1) if U is None else y.flatten(1) @ U

    def step(i: int, x: Tensor) -> Tensor:
        w = rotate(x - alpha[i] * m)
        memory.insert(0, V_scale[i] * (w + rho[i] ** 2 * rotate(checked(score(x, ts[i]), x))))
        del memory[p + 1 :]
        if i:
            ahead = _dot(correct[i - 1], memory) - _dot(predict[i - 1], memory[1:])
            w = w + rho[i] * ahead
        w1 = rho[i + 1] * (w / rho[i] + _dot(predict[i], memory))
        return (w1 if U is None else w1 @ U.mT).reshape(x.shape) + alpha[i + 1] * m

    return integrate(step, sde, x, ts, on_step=on_step, grad=grad, to_zero=False)


def _weights(at: Nodes, c: Tensor, i: int, known: Tensor) -> Tensor:
    """int L_j dr/(c_k + r^2) over step i, (K, D)."""
    r, r1 = at.r[i : i + 1], at.r[i + 1 : i + 2]
    return integrals(at, r, r1, known[None], lambda r: r / (c[:, None, None] + r**2))[:, 0].mT.contiguous()


def _dot(weights: Tensor, values: Sequence[Tensor]) -> Tensor:
    return sum((w * v for w, v in zip(weights, values, strict=False)), torch.zeros_like(values[0]))
