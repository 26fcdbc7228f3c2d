"""Heun's method in the noise level, with EDM's churn."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from samplers.loop import check, checked, combiner, integrate
from scoresde.types import SDE, Hook, Noise, Score


def heun(
    score: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    *,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    noise_scale: float = 1.0,
    noise: Noise = torch.randn_like,
    on_step: Hook | Sequence[Hook] = (),
    grad: bool = False,
) -> Tensor:
    """Heun in r = sigma/alpha for y = x/alpha, where dy/dr = eps   (Karras 2022, algorithm 2).

        rh = r (1 + gamma),  yh = y + noise_scale sqrt(rh^2 - r^2) z,
        y1 = yh + (r1 - rh) (eps(yh, rh) + eps(y', r1)) / 2,  y' = yh + (r1 - rh) eps(yh, rh)

    churn:  S_churn >= 0, total re-noising; gamma = min(churn/N, sqrt(2) - 1) while r is in
            churn_range (S_min, S_max), and rh never above r(T)
    x, ts and the rest as `euler_maruyama`.  churn = 0: deterministic, order 2 on the flow.
    2N network calls; a step to sigma = 0 is Euler's, so 2N - 1 then.
    """
    if churn < 0:
        raise ValueError(f"churn must be >= 0, got {churn}")
    check(sde, x, ts)
    N = len(ts) - 1
    r = torch.exp(-sde.lam(ts))
    low, high = churn_range
    inside = (r[:-1] >= low) & (r[:-1] <= high)
    gamma = min(churn / N, math.sqrt(2) - 1)
    rh = torch.where(inside, r[:-1] * (1 + gamma), r[:-1]).clamp(max=torch.exp(-sde.lam(ts.new_tensor(sde.T))))
    rh = torch.maximum(rh, r[:-1])
    th = torch.where(rh > r[:-1], sde.time(-torch.log(rh)), ts[:-1])
    alpha, alphah = sde.alpha(ts), sde.alpha(th)
    up = (alphah / alpha[:-1]).tolist()
    C = (alphah * noise_scale * torch.sqrt((rh - r[:-1]) * (rh + r[:-1]))).tolist()
    sh, s1 = (alphah * rh), sde.sigma(ts[1:])
    # in x: x' = (alpha1/alphah) xh + alpha1 (r1 - rh) eps, eps = -sigma s
    a = (alpha[1:] / alphah).tolist()
    b = (-alpha[1:] * (r[1:] - rh) * sh).tolist()
    b1 = (-alpha[1:] * (r[1:] - rh) * s1).tolist()
    last = [float(q) == 0 for q in s1]

    combine = combiner(x)

    def step(i: int, x: Tensor) -> Tensor:
        if C[i]:
            x = x.mul(up[i]).add_(noise(x), alpha=C[i])
        s = checked(score(x, th[i]), x)
        y = combine(a[i], x, b[i], s)
        if last[i]:
            return y
        ahead = checked(score(y, ts[i + 1]), x)
        return combine(a[i], x, 0.5 * b[i], s).add_(ahead, alpha=0.5 * b1[i])

    return integrate(step, sde, x, ts, on_step=on_step, grad=grad)
