"""Samplers of other libraries on the same exact score and starts: diffusers, k-diffusion, azula, torchdiffeq.

All deterministic diffusion sampling is one equation, dy/dr = eps(y, r) with y = x/alpha and
r = sigma/alpha.  A peer is a function of (eps, y, grid) -> y at the grid's end, so that each library
runs on every grid: its own and the others'.  Each is given its best:

diffusers    its tables are float32 and its time steps rounded; here the noise levels are written into
             the scheduler after `set_timesteps`, and the model is told the level the step uses
k-diffusion  its `sampling` module as it is, in float64
azula        its noise schedules as they are (with the ends set), and tables for the other grids
torchdiffeq  its fixed-grid methods on the flow in three coordinates; on x = (1 - t) x0 + t eps in t they
             are the solver of the flow_matching library

Nothing here is imported before it is asked for: `pip install scoresde[bench]` brings all of them.
"""

import contextlib
import importlib.util
import io
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from scoresde.types import SDE, Score, like

Eps = Callable[[Tensor, Tensor], Tensor]
"""eps(y, r) with y = x/alpha (B, ...) and r = sigma/alpha, () float64."""

LIBRARIES = ("diffusers", "k_diffusion", "azula", "torchdiffeq")

SHIPPED = {
    "diffusers": ("time", "scaled_linear", "cosine", "karras", "exponential", "beta", "flow", "flow_shift3"),
    "k_diffusion": ("time", "karras", "rho3", "rho5", "rho10", "exponential", "poly0.8", "poly1.25", "its own"),
    "azula": ("azula VE", "azula VP", "azula Cosine", "azula Rectified", "azula Decay"),
}
"""The grids that are in each library; torchdiffeq has none and leaves every one to the user."""


def shipped(library: str, grid: str) -> bool:
    """Whether the library has that grid itself, rather than taking it from outside."""
    return library not in SHIPPED or grid in SHIPPED[library]


@dataclass(frozen=True)
class Grid:
    """Noise levels of N steps: alpha, sigma (N+1,) float64, sigma/alpha decreasing.

    Only azula minds their common scale, and how a schedule names its times.
    """

    alpha: Tensor
    sigma: Tensor

    @property
    def r(self) -> Tensor:
        return self.sigma / self.alpha

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.alpha) - 1


@dataclass(frozen=True)
class Peer:
    """One sampler of a library: run(eps, y at grid.r[0], grid) -> y at grid.r[-1].

    own_grid: it chooses its own levels between the two ends
    """

    library: str
    name: str
    run: Callable[[Eps, Tensor, Grid], Tensor]
    own_grid: bool = False

    @property
    def label(self) -> str:
        return f"{self.library} {self.name}"

    def takes(self, grid: str) -> bool:
        """Whether to run it on that grid: azula's schedules are for azula, which so has three of the others."""
        if self.own_grid:
            return grid == "exponential"
        return grid not in ("exponential", "flow", "cosine") if self.library == "azula" else "azula" not in grid


def eps_of(score: Score, sde: SDE) -> Eps:
    """eps(y, r) = -sigma s(alpha y, t), t the SDE's time where sigma/alpha = r."""

    def eps(y: Tensor, r: Tensor) -> Tensor:
        t = sde.time(-torch.log(r))
        return like(-sde.sigma(t), y) * score(like(sde.alpha(t), y) * y, t)

    return eps


# ---------------------------------------------------------------------------------------------- grids


def _preserving(r: Tensor) -> Grid:
    """alpha^2 + sigma^2 = 1."""
    R = torch.hypot(torch.ones_like(r), r)
    return Grid(1 / R, r / R)


def _vp_r(t: Tensor) -> Tensor:
    return torch.expm1(t * (0.1 + 0.5 * 19.9 * t)).sqrt()


def _vp_t(r: float) -> float:
    B = math.log1p(r * r)
    return 2 * B / (0.1 + math.sqrt(0.01 + 2 * 19.9 * B))


def grids(r0: float, r1: float) -> dict[str, Callable[[int], Grid]]:
    """Every grid of the four libraries from r0 down to r1, by name, as functions of the number of steps."""

    def ramp(n: int) -> Tensor:
        return torch.linspace(0, 1, n + 1, dtype=torch.float64)

    def ends(r: Tensor) -> Tensor:
        r = r.clone()
        r[0], r[-1] = r0, r1
        return r

    def power(rho: float) -> Callable[[int], Grid]:
        a, b = r0 ** (1 / rho), r1 ** (1 / rho)
        return lambda n: _preserving(ends((a + ramp(n) * (b - a)) ** rho))

    def poly(rho: float) -> Callable[[int], Grid]:
        a, b = math.log(r0), math.log(r1)
        return lambda n: _preserving(ends(torch.exp((1 - ramp(n)) ** rho * (a - b) + b)))

    def time(p: float) -> Callable[[int], Grid]:
        a, b = _vp_t(r0) ** (1 / p), _vp_t(r1) ** (1 / p)
        return lambda n: _preserving(ends(_vp_r((a + ramp(n) * (b - a)) ** p)))

    def stable(n: int) -> Grid:
        """Latent diffusion's table, linear in sqrt(beta), in continuous time: uniform in t where it reaches."""
        low, high = math.sqrt(0.85), math.sqrt(12.0)

        def B(t: Tensor) -> Tensor:
            return ((low + t * (high - low)) ** 3 - low**3) / (3 * (high - low))

        def inverse(r: float) -> float:
            return float((3 * (high - low) * math.log1p(r * r) + low**3) ** (1 / 3) - low) / (high - low)

        a, b = inverse(r0), inverse(r1)
        return _preserving(ends(torch.expm1(B(a + ramp(n) * (b - a))).sqrt()))

    def beta(n: int) -> Grid:
        """Beta(0.6, 0.6) quantiles of the time."""
        from scipy.stats import beta as law

        q = torch.from_numpy(law.ppf(1 - ramp(n).numpy(), 0.6, 0.6))
        a, b = _vp_t(r0), _vp_t(r1)
        return _preserving(ends(_vp_r(b + q * (a - b))))

    def shifted(shift: float) -> Callable[[int], Grid]:
        """Uniform in u, t = shift u/(1 + (shift - 1) u), alpha = 1 - t, sigma = t."""

        def u_of(r: float) -> float:
            t = r / (1 + r)
            return t / (shift - (shift - 1) * t)

        def make(n: int) -> Grid:
            u = u_of(r0) + ramp(n) * (u_of(r1) - u_of(r0))
            t = shift * u / (1 + (shift - 1) * u)
            r = ends(t / (1 - t))
            return Grid(1 / (1 + r), r / (1 + r))

        return make

    def cosine(n: int) -> Grid:
        """Uniform in atan r   (Nichol 2021)."""
        a, b = math.atan(r0), math.atan(r1)
        return _preserving(ends(torch.tan(a + ramp(n) * (b - a))))

    return {
        "time": time(1),
        "time_quadratic": time(2),
        "exponential": lambda n: _preserving(ends(torch.exp(math.log(r0) + ramp(n) * math.log(r1 / r0)))),
        "karras": power(7),
        "rho3": power(3),
        "rho5": power(5),
        "rho10": power(10),
        "poly0.8": poly(0.8),
        "poly1.25": poly(1.25),
        "beta": beta,
        "scaled_linear": stable,
        "cosine": cosine,
        "flow": shifted(1),
        "flow_shift3": shifted(3),
        **_azula_grids(r0, r1),
    }


def _azula_grids(r0: float, r1: float) -> dict[str, Callable[[int], Grid]]:
    """azula's schedules at uniform times, with the parameters that put the ends at r0 and r1."""
    if not installed("azula"):
        return {}
    from azula import noise

    cosine = math.sqrt((1 + r1 * r1) / (1 + r0 * r0))
    rectified = 1 / r0
    schedules = {
        "azula VE": noise.VESchedule(sigma_min=r1, sigma_max=r0),
        "azula VP": noise.VPSchedule(alpha_min=cosine, sigma_min=r1),
        "azula Cosine": noise.CosineSchedule(alpha_min=cosine, sigma_min=r1),
        "azula Rectified": noise.RectifiedSchedule(alpha_min=rectified, sigma_min=r1),
        "azula Decay": noise.DecaySchedule(alpha_min=rectified, sigma_min=r1),
    }

    def at(schedule: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[int], Grid]:
        def make(n: int) -> Grid:
            alpha, sigma = schedule(torch.linspace(1, 0, n + 1, dtype=torch.float64))
            sigma = sigma.clone()
            sigma[0], sigma[-1] = r0 * alpha[0], r1 * alpha[-1]
            return Grid(alpha, sigma)

        return make

    return {name: at(schedule) for name, schedule in schedules.items()}


# ---------------------------------------------------------------------------------------------- libraries


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def peers(libraries: tuple[str, ...] = LIBRARIES) -> list[Peer]:
    """The deterministic samplers of the libraries asked for; a missing one is an error that says what to install."""
    makers = {
        "diffusers": _diffusers, "k_diffusion": _k_diffusion, "azula": _azula, "torchdiffeq": _torchdiffeq,
    }  # fmt: skip
    for library in libraries:
        if library not in makers:
            raise ValueError(f"unknown library {library!r}; choose from {', '.join(LIBRARIES)}")
        if not installed(library):
            raise ImportError(f"{library} is not installed; pip install 'scoresde[bench]'")
    return [peer for library in libraries for peer in makers[library]()]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# ---------------------------------------------------------------------------------------------- diffusers


def _variance_preserving(eps: Eps, x: Tensor, sigma: Tensor) -> Tensor:
    """eps at x = y / sqrt(1 + sigma^2), the state of diffusers' DDIM, DPM-Solver, DEIS and UniPC."""
    return eps(x * torch.sqrt(1 + sigma**2), sigma)


def _diffusers() -> list[Peer]:
    with _quietly():
        import diffusers
    diffusers.utils.logging.set_verbosity_error()

    def scheduler(name: str, **config: Any) -> Any:
        with _quietly():
            return getattr(diffusers, name)(**config)

    def multistep(name: str, **config: Any) -> Callable[..., Tensor]:
        """Schedulers in x = alpha y that keep N+1 `sigmas` and step through them by index."""

        def run(eps: Eps, y: Tensor, grid: Grid) -> Tensor:
            s = scheduler(name, **config)
            s.set_timesteps(len(grid))
            s.sigmas = grid.r
            s.timesteps = torch.arange(len(grid), 0, -1)
            x = y / torch.sqrt(1 + grid.r[0] ** 2)
            for i, t in enumerate(s.timesteps):
                x = s.step(_variance_preserving(eps, x, s.sigmas[i]), t, x).prev_sample
            return x.double() * torch.sqrt(1 + grid.r[-1] ** 2)

        return run

    def singlestep(**config: Any) -> Callable[..., Tensor]:
        inner = multistep("DPMSolverSinglestepScheduler", **config)
        order = config["solver_order"]

        def run(eps: Eps, y: Tensor, grid: Grid) -> Tensor:
            if len(grid) % order and not config["lower_order_final"]:
                raise ArithmeticError(f"{len(grid)} is no multiple of the order {order}")
            return inner(eps, y, grid)

        return run

    def exploding(name: str, **step: Any) -> Callable[..., Tensor]:
        """Schedulers in y, one call a step."""

        def run(eps: Eps, y: Tensor, grid: Grid) -> Tensor:
            s = scheduler(name)
            s.set_timesteps(len(grid))
            s.sigmas = grid.r
            s.timesteps = torch.arange(len(grid), 0, -1, dtype=torch.float64)
            for i, t in enumerate(s.timesteps):
                s.scale_model_input(y, t)
                y = s.step(eps(y, s.sigmas[i]), t, y, **step).prev_sample
            return y.double()

        return run

    def heun(eps: Eps, y: Tensor, grid: Grid) -> Tensor:
        s = scheduler("HeunDiscreteScheduler")
        s.set_timesteps(len(grid) + 1)
        N, r = len(grid), grid.r
        s.sigmas = torch.cat([r[:1], r[1:].repeat_interleave(2)])
        s.timesteps = torch.arange(N, 0, -1, dtype=torch.float64).repeat_interleave(2) - torch.tensor([0, 0.5]).repeat(
            N
        )
        for i, t in enumerate(s.timesteps):
            s.scale_model_input(y, t)
            y = s.step(eps(y, r[(i + 1) // 2]), t, y).prev_sample
        return y

    def kdpm2(eps: Eps, y: Tensor, grid: Grid) -> Tensor:
        s = scheduler("KDPM2DiscreteScheduler")
        s.set_timesteps(len(grid) + 1)
        N, r = len(grid), grid.r
        between = (r[1:] * r[:-1]).sqrt()  # its own: halfway in log r
        s.sigmas = torch.cat([r[:1], r[1:].repeat_interleave(2)])
        s.sigmas_interpol = torch.cat([r[:1], torch.stack([between, r[1:]], 1).flatten()])
        s.timesteps = torch.arange(N, 0, -1, dtype=torch.float64).repeat_interleave(2) - torch.tensor([0, 0.5]).repeat(
            N
        )
        for i, t in enumerate(s.timesteps):
            s.scale_model_input(y, t)
            level = s.sigmas_interpol[i] if i % 2 else s.sigmas[i]
            y = s.step(eps(y, level), t, y).prev_sample
        return y

    def table(name: str, per_step: int = 1, **config: Any) -> Callable[..., Tensor]:
        """Schedulers that look up alphas_cumprod: their training table is made the grid itself."""

        def run(eps: Eps, y: Tensor, grid: Grid) -> Tensor:
            N = len(grid)
            s = scheduler(name, num_train_timesteps=per_step * N, steps_offset=0, **config)
            s.set_timesteps(N)
            log_r = torch.log(grid.r.flip(0))  # ends first
            fine = torch.cat(
                [torch.lerp(log_r[:-1], log_r[1:], (j + 1) / per_step)[:, None] for j in range(per_step)], 1
            )
            r = torch.exp(fine.flatten())  # per_step entries a step; the grid's own at the last of them
            offset = per_step - 1
            s.alphas_cumprod = 1 / (1 + torch.cat([r[offset:], r[-1:].expand(offset)]) ** 2)
            s.final_alpha_cumprod = 1 / (1 + grid.r[-1] ** 2)
            x = y / torch.sqrt(1 + grid.r[0] ** 2)
            for t in s.timesteps:
                level = torch.sqrt(1 / s.alphas_cumprod[t] - 1)
                x = s.step(_variance_preserving(eps, x, level), int(t), x).prev_sample
            return x * torch.sqrt(1 + grid.r[-1] ** 2)

        return run

    def ipndm(eps: Eps, y: Tensor, grid: Grid) -> Tensor:
        s = scheduler("IPNDMScheduler")
        s.set_timesteps(len(grid))
        R = torch.sqrt(1 + grid.r**2)
        s.alphas, s.betas = 1 / R, grid.r / R
        s.timesteps = torch.arange(len(grid), 0, -1, dtype=torch.float64)
        x = y / R[0]
        for i, t in enumerate(s.timesteps):
            v = (_variance_preserving(eps, x, grid.r[i]) - s.betas[i] * x) / s.alphas[i]  # so that its ets are eps
            x = s.step(v, t, x).prev_sample
        return x * R[-1]

    found: dict[str, Callable[..., Tensor]] = {
        "DDIM": table("DDIMScheduler", clip_sample=False),
        "PLMS": table("PNDMScheduler", skip_prk_steps=True, timestep_spacing="leading"),
        "PNDM": table("PNDMScheduler", per_step=2, skip_prk_steps=False, timestep_spacing="leading"),
        "IPNDM": ipndm,
        "Euler": exploding("EulerDiscreteScheduler"),
        "Heun": heun,
        "KDPM2": kdpm2,
        "LMS": exploding("LMSDiscreteScheduler"),
    }
    for final in (True, False):
        end: dict[str, Any] = {"final_sigmas_type": "sigma_min", "lower_order_final": final}
        tail = "" if final else " full"  # full order to the last step
        for plus in ("dpmsolver++", "dpmsolver"):
            name = "DPM-Solver++" if plus == "dpmsolver++" else "DPM-Solver"
            kind = {**end, "algorithm_type": plus}
            found[f"{name} 2M{tail}"] = multistep("DPMSolverMultistepScheduler", solver_order=2, **kind)
            found[f"{name} 2M heun{tail}"] = multistep(
                "DPMSolverMultistepScheduler", solver_order=2, solver_type="heun", **kind
            )
            found[f"{name} 3M{tail}"] = multistep("DPMSolverMultistepScheduler", solver_order=3, **kind)
            found[f"{name} 2S{tail}"] = singlestep(solver_order=2, **kind)
            found[f"{name} 3S{tail}"] = singlestep(solver_order=3, **kind)
        deis: dict[str, Any] = {"algorithm_type": "deis", "lower_order_final": final}
        found |= {f"DEIS-{k}{tail}": multistep("DEISMultistepScheduler", solver_order=k, **deis) for k in (2, 3)}
        for k in (2, 3, 4):
            for b in ("bh1", "bh2") if k == 2 else ("bh2",):  # from order 3 on they give the same
                for x0 in (True, False):
                    found[f"UniPC-{k} {b}{'' if x0 else ' eps'}{tail}"] = multistep(
                        "UniPCMultistepScheduler", solver_order=k, solver_type=b, predict_x0=x0, **end
                    )
        for p, c in ((2, 2), (3, 3)):
            found[f"SA-Solver {p},{c}{tail}"] = multistep(
                "SASolverScheduler", predictor_order=p, corrector_order=c,
                tau_func=lambda t: 0, lower_order_final=final,
            )  # fmt: skip
    return [Peer("diffusers", name, run) for name, run in found.items()]


# ---------------------------------------------------------------------------------------------- k-diffusion


@cache
def k_sampling() -> types.ModuleType:
    """k_diffusion.sampling alone: the package's own __init__ brings CLIP, wandb and evaluation code it never uses."""
    package = importlib.util.find_spec("k_diffusion")
    if package is None or package.submodule_search_locations is None:
        raise ImportError("k_diffusion is not installed; pip install 'scoresde[bench]'")
    shim = None
    if "k_diffusion" not in sys.modules:
        shim = types.ModuleType("k_diffusion")
        shim.__path__ = list(package.submodule_search_locations)
        sys.modules["k_diffusion"] = shim
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        if shim is not None:
            del sys.modules["k_diffusion"]


def _k_diffusion() -> list[Peer]:
    k = k_sampling()

    def denoiser(eps: Eps) -> Callable[..., Tensor]:
        def model(y: Tensor, sigma: Tensor) -> Tensor:
            r = sigma.flatten()[0].double()
            return y - r * eps(y, r)

        return model

    def on(sampler: str, **knobs: Any) -> Callable[..., Tensor]:
        def run(eps: Eps, y: Tensor, grid: Grid) -> Tensor:
            return getattr(k, sampler)(denoiser(eps), y, grid.r, disable=True, **knobs)

        return run

    def silent(*_: Any) -> float:
        return 0.0

    def fast(eps: Eps, y: Tensor, grid: Grid) -> Tensor:
        with _quietly():  # it warns of float64 ends, which it would round if they were numbers
            return k.sample_dpm_fast(
                denoiser(eps), y, grid.r[-1], grid.r[0], len(grid), disable=True, noise_sampler=silent
            )

    still = {"eta": 0.0, "noise_sampler": silent}
    found = {
        "euler": on("sample_euler"),
        "heun": on("sample_heun"),
        "dpm_2": on("sample_dpm_2"),
        **{f"lms-{m}": on("sample_lms", order=m) for m in (2, 3, 4)},
        "dpmpp_2s": on("sample_dpmpp_2s_ancestral", **still),
        "dpmpp_2m": on("sample_dpmpp_2m"),
        "dpmpp_2m_sde": on("sample_dpmpp_2m_sde", solver_type="heun", **still),
        "dpmpp_3m_sde": on("sample_dpmpp_3m_sde", **still),
    }
    return [
        *(Peer("k_diffusion", name, run) for name, run in found.items()),
        Peer("k_diffusion", "dpm_fast", fast, own_grid=True),
    ]


# ---------------------------------------------------------------------------------------------- azula


def _azula() -> list[Peer]:
    from azula import sample
    from azula.denoise import Denoiser, DiracPosterior

    class Table(Denoiser):  # its samplers ask for its classes
        def __init__(self, eps: Eps, grid: Grid) -> None:
            super().__init__()
            self.eps, self.grid = eps, grid

        def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
            k = t.round().long()  # times are the steps' numbers
            return self.grid.alpha[k], self.grid.sigma[k]

        def forward(self, x: Tensor, t: Tensor, **_: Any) -> Any:
            alpha, sigma = self.schedule(t)
            return DiracPosterior((x - sigma * self.eps(x / alpha, sigma / alpha)) / alpha)

    def of(sampler: str, **knobs: Any) -> Callable[..., Tensor]:
        def run(eps: Eps, y: Tensor, grid: Grid) -> Tensor:
            N = len(grid)
            s = getattr(sample, sampler)(
                Table(eps, grid), start=0, stop=N, steps=N, silent=True, dtype=torch.float64, **knobs
            )
            return s(grid.alpha[0] * y) / grid.alpha[-1]

        return run

    found = {"DDIM": of("DDIMSampler"), "Euler": of("EulerSampler"), "Heun": of("HeunSampler")}
    for family in ("zAB", "vAB", "zEAB", "xEAB", "REAB"):
        found |= {f"{family}-{m}": of(f"{family}Sampler", order=m) for m in (2, 3, 4)}
    return [Peer("azula", name, run) for name, run in found.items()]


# ---------------------------------------------------------------------------------------------- torchdiffeq


def _torchdiffeq() -> list[Peer]:
    import torchdiffeq

    def flow(eps: Eps, y: Tensor, grid: Grid, method: str) -> Tensor:
        """x = y/(1 + r) in t = r/(1 + r): dx/dt = eps - x0, as flow_matching does."""
        r = grid.r
        t = r / (1 + r)

        def rhs(t: Tensor, x: Tensor) -> Tensor:
            r = t / (1 - t)
            e = eps(x * (1 + r), r)
            return e - (x * (1 + r) - r * e)

        return torchdiffeq.odeint(rhs, y / (1 + r[0]), t, method=method)[-1] * (1 + r[-1])

    def time(eps: Eps, y: Tensor, grid: Grid, method: str) -> Tensor:
        """x = y/sqrt(1 + r^2) in the time of VP, beta 0.1..20: dx/dt = beta/2 (eps/sigma - x)."""
        r = grid.r
        t = torch.tensor([_vp_t(float(q)) for q in r], dtype=torch.float64)

        def rhs(t: Tensor, x: Tensor) -> Tensor:
            r = _vp_r(t)
            R = torch.sqrt(1 + r**2)
            return 0.5 * (0.1 + 19.9 * t) * (eps(x * R, r) * R / r - x)

        return torchdiffeq.odeint(rhs, y / torch.sqrt(1 + r[0] ** 2), t, method=method)[-1] * torch.sqrt(1 + r[-1] ** 2)

    def log(eps: Eps, y: Tensor, grid: Grid, method: str) -> Tensor:
        """x = y/sqrt(1 + r^2) in u = log r: dx/du = (r/R)(eps - (r/R) x)."""
        r = grid.r

        def rhs(u: Tensor, x: Tensor) -> Tensor:
            r = torch.exp(u)
            R = torch.sqrt(1 + r**2)
            return r / R * (eps(x * R, r) - r / R * x)

        x = torchdiffeq.odeint(rhs, y / torch.sqrt(1 + r[0] ** 2), torch.log(r), method=method)[-1]
        return x * torch.sqrt(1 + r[-1] ** 2)

    def of(coordinate: Callable[..., Tensor], method: str) -> Callable[..., Tensor]:
        return lambda eps, y, grid: coordinate(eps, y, grid, method)

    methods = ("midpoint", "heun2", "heun3", "rk4")
    return [
        Peer("torchdiffeq", f"{method} in {name}", of(coordinate, method))
        for name, coordinate in (("flow", flow), ("time", time), ("log", log))
        for method in methods
    ]
