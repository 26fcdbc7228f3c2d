"""torchdiffeq's fixed-grid methods on the flow in two coordinates; a third is flow_matching's."""

from collections.abc import Callable

import torch
from torch import Tensor

from experiments.peers.grids import Grid, vp_r, vp_t
from experiments.peers.kinds import Eps, Peer


def peers() -> list[Peer]:
    import torchdiffeq

    def time(eps: Eps, y: Tensor, grid: Grid, method: str) -> Tensor:
        """x = y/sqrt(1 + r^2) in the time of VP, beta 0.1..20: dx/dt = beta/2 (eps/sigma - x)."""
        r = grid.r
        t = torch.tensor([vp_t(float(q)) for q in r], dtype=torch.float64)

        def rhs(t: Tensor, x: Tensor) -> Tensor:
            r = vp_r(t)
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
        for name, coordinate in (("time", time), ("log", log))
        for method in methods
    ]
