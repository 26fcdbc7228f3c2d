"""Decoupled annealing: sample x0 given x_t and y, then noise it to the next level   (Zhang 2024, DAPS).

    s, hook = daps(score, sde, A, y, noise_sd)
    x = ddim(s, sde, x, ts, on_step=hook)           # or any sampler of one call a step

If x0 were drawn from p(x0 | x_t, y), every x_t would follow p(x_t | y), however long the steps: errors do not add up
along the path.
"""

import torch
from torch import Tensor

from guidance.operators import Linear, Operator, check_noise, measured
from scoresde.convert import denoised
from scoresde.types import SDE, Hook, Noise, Score, like


def daps(
    score: Score,
    sde: SDE,
    A: Operator,
    y: Tensor,
    noise_sd: float,
    *,
    spread: float = 1.0,
    ode_steps: int = 5,
    langevin_steps: int = 100,
    step: float = 0.1,
    noise: Noise = torch.randn_like,
) -> tuple[Score, Hook]:
    """x0 ~ N(x0'; spread^2 r^2 I) N(y; A(x0), noise_sd^2 I), up to scale;  x1 = alpha1 x0 + sigma1 z.

    x0' = the end of the probability flow from x_t: `ode_steps` DDIM steps to t_min, geometric in sigma/alpha
    A:              any differentiable operator
    y:              one measurement, A(x0)'s shape without the batch, or one for each sample
    spread:         of x0 | x_t, in r = sigma/alpha; the paper's r_t = sigma_t is 1
    langevin_steps: of size step/(1/(spread r)^2 + 1/noise_sd^2) from x0' where A is not linear, each a product with A's
                    Jacobian and no network call; for a `Linear` A x0 is drawn exactly, by one `ridge`
    The score is that of the flow's end, (alpha x0' - x)/sigma^2; the hook throws the sampler's own step away.

    Bias: a Gaussian about one point stands for p(x0 | x_t), and an isotropic one; exact only where the data are one
    point wide at each scale.  ode_steps network calls a step of the sampler, no Jacobian product of the network.
    """
    check_noise(noise_sd, positive=True, finite=True)
    if ode_steps < 1 or langevin_steps < 1:
        raise ValueError(f"ode_steps and langevin_steps must be at least 1, got {ode_steps} and {langevin_steps}")
    if not (spread > 0 and 0 < step < 2):
        raise ValueError(f"spread must be positive and step lie in (0, 2), got {spread} and {step}")
    seen: list[tuple[Tensor, Tensor]] = []  # x0' and t of the last call

    def ahead(x: Tensor, t: Tensor) -> Tensor:
        first, u, x0 = sde.lam(t), torch.linspace(0, 1, ode_steps + 1, dtype=torch.float64)[1:-1].tolist(), x
        end, z, at = sde.lam(torch.tensor(sde.t_min, dtype=torch.float64)), x, t
        for to in [*(sde.time(first + c * (end - first).clamp(min=0)) for c in u), None]:
            s = score(z, at)
            x0 = denoised(s, z, at, sde)
            if to is not None:
                z, at = like(sde.alpha(to), x) * x0 - like(sde.sigma(to) * sde.sigma(at), x) * s, to
        seen[:] = [(x0, t)]
        return (like(sde.alpha(t), x) * x0 - x) / like(sde.sigma(t) ** 2, x)

    def hook(i: int, t: Tensor, x: Tensor) -> Tensor:
        if not seen:
            raise ValueError("the sampler did not call the score that daps returned: give it both")
        x0, before = seen[0]
        width = spread * torch.exp(-sde.lam(before))
        if isinstance(A, Linear):
            x0 = x0 + like(width, x0) * noise(x0)  # a draw of both, moved by what it misses of y   (Matheron)
            gap = measured(A, y, x0)
            x0 = x0 + A.ridge(gap + noise_sd * noise(gap), noise_sd**2 / width**2)
        else:
            e = like(step / (1 / width**2 + 1 / noise_sd**2), x0)
            middle = x0
            for _ in range(langevin_steps):
                gap, pull = torch.func.vjp(lambda x: measured(A, y, x), x0)  # type: ignore[misc]
                slope = (middle - x0) / like(width**2, x0) - pull(gap)[0] / noise_sd**2
                x0 = x0 + e * slope + (2 * e) ** 0.5 * noise(x0)
        return like(sde.alpha(t), x) * x0 + like(sde.sigma(t), x) * noise(x)

    return ahead, hook
