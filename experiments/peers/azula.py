"""azula's samplers on tables of its schedules' alpha and sigma, and on those of the other grids."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from experiments.peers.grids import Grid
from experiments.peers.kinds import Eps, Peer


def peers() -> list[Peer]:
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
    noisy = {"DDPM": of("DDPMSampler"), "Ito": of("ItoSampler"), "PC": of("PCSampler")}
    return [
        *(Peer("azula", name, run) for name, run in found.items()),
        *(Peer("azula", name, run, noisy=True) for name, run in noisy.items()),
    ]
