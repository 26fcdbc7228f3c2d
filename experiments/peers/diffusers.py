"""diffusers' schedulers at exact noise levels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from experiments.peers.grids import Grid
from experiments.peers.kinds import Eps, Peer, quietly


def _variance_preserving(eps: Eps, x: Tensor, sigma: Tensor) -> Tensor:
    """eps at x = y / sqrt(1 + sigma^2), the state of diffusers' DDIM, DPM-Solver, DEIS and UniPC."""
    return eps(x * torch.sqrt(1 + sigma**2), sigma)


def peers() -> list[Peer]:
    with quietly():
        import diffusers
    diffusers.utils.logging.set_verbosity_error()

    def scheduler(name: str, **config: Any) -> Any:
        with quietly():
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

    def ddpm(variance: str) -> Callable[..., Tensor]:
        def run(eps: Eps, y: Tensor, grid: Grid) -> Tensor:
            N = len(grid)
            s = scheduler("DDPMScheduler", num_train_timesteps=N + 1, variance_type=variance, clip_sample=False)
            s.set_timesteps(N + 1)  # label 0 is the end, which is not stepped from
            s.alphas_cumprod = 1 / (1 + grid.r.flip(0) ** 2)
            x = y / torch.sqrt(1 + grid.r[0] ** 2)
            for i, t in enumerate(s.timesteps[:-1]):
                x = s.step(_variance_preserving(eps, x, grid.r[i]), int(t), x).prev_sample
            return x * torch.sqrt(1 + grid.r[-1] ** 2)

        return run

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
    noisy: dict[str, Callable[..., Tensor]] = {
        "EulerAncestral": exploding("EulerAncestralDiscreteScheduler"),
        "DDPM": ddpm("fixed_small"),
        "DDPM large": ddpm("fixed_large"),
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
            for tau, said in ((1.0, ""), (0.5, ", tau = 1/2")):
                noisy[f"SA-Solver {p},{c}{tail}{said}"] = multistep(
                    "SASolverScheduler", predictor_order=p, corrector_order=c,
                    tau_func=lambda t, tau=tau: tau, lower_order_final=final,
                )  # fmt: skip
        sde = {**end, "algorithm_type": "sde-dpmsolver++"}
        for p in (2, 3):
            noisy[f"SDE-DPM-Solver++ {p}M{tail}"] = multistep("DPMSolverMultistepScheduler", solver_order=p, **sde)
        noisy[f"SDE-DPM-Solver++ 2M heun{tail}"] = multistep(
            "DPMSolverMultistepScheduler", solver_order=2, solver_type="heun", **sde
        )
        noisy[f"SDE-DPM-Solver++ 2S{tail}"] = singlestep(solver_order=2, **sde)
        sde["algorithm_type"] = "sde-dpmsolver"
        noisy[f"SDE-DPM-Solver 2M{tail}"] = multistep("DPMSolverMultistepScheduler", solver_order=2, **sde)
    return [
        *(Peer("diffusers", name, run) for name, run in found.items()),
        *(Peer("diffusers", name, run, noisy=True) for name, run in noisy.items()),
    ]
