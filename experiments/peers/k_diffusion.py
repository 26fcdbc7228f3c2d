"""k-diffusion's `sampling` module as it is, in float64."""

import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from experiments.peers.grids import Grid
from experiments.peers.kinds import Eps, Peer, quietly


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


def peers() -> list[Peer]:
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
        with quietly():  # it warns of float64 ends, which it would round if they were numbers
            return k.sample_dpm_fast(
                denoiser(eps), y, grid.r[-1], grid.r[0], len(grid), disable=True, noise_sampler=silent
            )

    def noisy(sampler: str, **knobs: Any) -> Callable[..., Tensor]:
        """Fresh draws: increments of the Brownian tree, without its time."""

        def run(eps: Eps, y: Tensor, grid: Grid) -> Tensor:
            return on(sampler, noise_sampler=lambda *_: torch.randn_like(y), **knobs)(eps, y, grid)

        return run

    def churned(sampler: str) -> Callable[..., Tensor]:
        """EDM's noise, up by 4/N of the level, wherever that stays below the start."""

        def run(eps: Eps, y: Tensor, grid: Grid) -> Tensor:
            top = float(grid.r[0]) / (1 + min(4 / len(grid), math.sqrt(2) - 1))
            return on(sampler, s_churn=4.0, s_tmax=top)(eps, y, grid)

        return run

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
    stochastic = {
        "euler_ancestral": noisy("sample_euler_ancestral"),
        "dpm_2_ancestral": noisy("sample_dpm_2_ancestral"),
        "dpmpp_2s_ancestral": noisy("sample_dpmpp_2s_ancestral"),
        "dpmpp_sde": noisy("sample_dpmpp_sde"),
        "dpmpp_2m_sde": noisy("sample_dpmpp_2m_sde"),
        "dpmpp_2m_sde heun": noisy("sample_dpmpp_2m_sde", solver_type="heun"),
        "dpmpp_2m_sde, eta = 1/4": noisy("sample_dpmpp_2m_sde", eta=0.25),  # eta = tau^2
        "dpmpp_3m_sde": noisy("sample_dpmpp_3m_sde"),
        "dpmpp_3m_sde, eta = 1/4": noisy("sample_dpmpp_3m_sde", eta=0.25),
        "euler, churn": churned("sample_euler"),
        "heun, churn": churned("sample_heun"),
    }
    return [
        *(Peer("k_diffusion", name, run) for name, run in found.items()),
        Peer("k_diffusion", "dpm_fast", fast, own_grid=True),
        *(Peer("k_diffusion", name, run, noisy=True) for name, run in stochastic.items()),
    ]
