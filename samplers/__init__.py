"""Samplers: functions (score, sde, x, ts, *, knobs, noise, on_step, grad) -> x at ts[-1]."""

from collections.abc import Callable

from torch import Tensor

from samplers import exponential, grids, hooks, kernels
from samplers.adaptive_sde import gotta_go_fast
from samplers.angle import angle
from samplers.auto import auto, choose, load_fitted
from samplers.brownian import brownian
from samplers.calibrated import Calibration, calibrated, load_calibration
from samplers.calibration import calibrate
from samplers.fitted import FittedGrid, fit_grid, load_grid
from samplers.girsanov import girsanov
from samplers.grids import perturb
from samplers.heun import heun
from samplers.langevin import annealed, langevin, predictor_corrector
from samplers.moves import metropolis, relax
from samplers.multistep import deis, dpmpp, multistep, pndm, unipc
from samplers.ode import ode
from samplers.onestep import ancestral, ddim, euler_maruyama, flow_euler, reverse_diffusion
from samplers.parallel import parallel
from samplers.preconditioned import preconditioned
from samplers.restart import restart
from samplers.singlestep import dpm_solver, midpoint, ralston, singlestep
from samplers.stochastic import er_sde, exponential_euler, sa_solver, sde_dpmpp, seeds

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler_maruyama": euler_maruyama,
    "flow_euler": flow_euler,
    "reverse_diffusion": reverse_diffusion,
    "ancestral": ancestral,
    "ddim": ddim,
    "heun": heun,
    "midpoint": midpoint,
    "ralston": ralston,
    "dpm_solver": dpm_solver,
    "singlestep": singlestep,
    "dpmpp": dpmpp,
    "multistep": multistep,
    "deis": deis,
    "pndm": pndm,
    "unipc": unipc,
    "angle": angle,
    "exponential_euler": exponential_euler,
    "sde_dpmpp": sde_dpmpp,
    "sa_solver": sa_solver,
    "seeds": seeds,
    "er_sde": er_sde,
    "restart": restart,
    "predictor_corrector": predictor_corrector,
    "gotta_go_fast": gotta_go_fast,
    "ode": ode,
}
"""Every public sampler by name; the contract test runs over this table."""

__all__ = [
    "SAMPLERS", "Calibration", "FittedGrid", "ancestral", "angle", "annealed", "auto", "brownian", "calibrate",
    "calibrated", "choose", "ddim", "deis", "dpm_solver", "dpmpp", "er_sde", "euler_maruyama", "exponential",
    "exponential_euler", "fit_grid", "flow_euler", "girsanov", "gotta_go_fast", "grids", "heun", "hooks", "kernels",
    "langevin", "load_calibration", "load_fitted", "load_grid", "metropolis", "midpoint", "multistep", "ode",
    "parallel", "perturb", "pndm", "preconditioned", "predictor_corrector", "ralston", "relax", "restart",
    "reverse_diffusion", "sa_solver", "sde_dpmpp", "seeds", "singlestep", "unipc",
]  # fmt: skip
