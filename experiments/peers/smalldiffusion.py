"""smalldiffusion's one sampler: gam averages two eps, mu is the share of noise."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from experiments.peers.grids import Grid
from experiments.peers.kinds import Eps, Peer


def peers() -> list[Peer]:
    from smalldiffusion import samples

    class Known:  # the methods its sampler asks of a model
        def __init__(self, eps: Eps, shape: torch.Size) -> None:
            self.eps, self.shape = eps, shape

        def eval(self) -> None: ...

        def rand_input(self, n: int) -> Tensor:
            return torch.randn(n, *self.shape[1:], dtype=torch.float64)

        def predict_eps_cfg(self, x: Tensor, sigma: Tensor, *_: Any) -> Tensor:
            return self.eps(x, sigma)

    def of(gam: float, mu: float) -> Callable[..., Tensor]:
        def run(eps: Eps, y: Tensor, grid: Grid) -> Tensor:
            on = SimpleNamespace(device=y.device)
            return list(samples(Known(eps, y.shape), grid.r, gam=gam, mu=mu, xt=y, accelerator=on))[-1]

        return run

    return [
        Peer("smalldiffusion", "DDIM", of(1.0, 0.0)),
        Peer("smalldiffusion", "accelerated", of(2.0, 0.0)),
        Peer("smalldiffusion", "DDPM", of(1.0, 0.5), noisy=True),
        Peer("smalldiffusion", "accelerated, noise", of(2.0, 0.5), noisy=True),
    ]
