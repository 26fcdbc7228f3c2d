"""flow_matching's solver on x = y/(1 + r) in t = r/(1 + r): dx/dt = eps - x0."""

from collections.abc import Callable

from torch import Tensor

from experiments.peers.grids import Grid
from experiments.peers.kinds import Eps, Peer


def peers() -> list[Peer]:
    from flow_matching.solver import ODESolver

    def of(method: str) -> Callable[..., Tensor]:
        def run(eps: Eps, y: Tensor, grid: Grid) -> Tensor:
            def velocity(x: Tensor, t: Tensor) -> Tensor:
                r = t / (1 - t)
                e = eps(x * (1 + r), r)
                return e - (x * (1 + r) - r * e)

            t = grid.r / (1 + grid.r)
            x = ODESolver(velocity).sample(y / (1 + grid.r[0]), step_size=None, method=method, time_grid=t)
            return x * (1 + grid.r[-1])

        return run

    return [Peer("flow_matching", method, of(method)) for method in ("euler", "midpoint", "heun2", "heun3", "rk4")]
