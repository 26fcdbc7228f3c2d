"""Samplers: functions (score, sde, x, ts, *, knobs, noise, on_step, grad) -> x at ts[-1]."""

from collections.abc import Callable

from torch import Tensor

from samplers import grids, hooks, kernels
from samplers.grids import perturb
from samplers.heun import heun
from samplers.langevin import annealed, langevin, predictor_corrector
from samplers.ode import ode
from samplers.onestep import ancestral, ddim, euler_maruyama, flow_euler, reverse_diffusion

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler_maruyama": euler_maruyama,
    "flow_euler": flow_euler,
    "reverse_diffusion": reverse_diffusion,
    "ancestral": ancestral,
    "ddim": ddim,
    "heun": heun,
    "predictor_corrector": predictor_corrector,
    "ode": ode,
}
"""Every public sampler by name; the contract test runs over this table."""

__all__ = [
    "SAMPLERS", "ancestral", "annealed", "ddim", "euler_maruyama", "flow_euler", "grids", "heun", "hooks",
    "kernels", "langevin", "ode", "perturb", "predictor_corrector", "reverse_diffusion",
]  # fmt: skip
