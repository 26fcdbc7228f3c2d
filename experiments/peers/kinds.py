"""What a peer is: a sampler of another library as a function of (eps, y, grid)."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.peers.grids import Grid
from scoresde.types import SDE, Score, like

Eps = Callable[[Tensor, Tensor], Tensor]
"""eps(y, r) with y = x/alpha (B, ...) and r = sigma/alpha, () float64."""


@dataclass(frozen=True)
class Peer:
    """One sampler of a library: run(eps, y at grid.r[0], grid) -> y at grid.r[-1].

    own_grid: it chooses its own levels between the two ends
    noisy:    it draws noise, from torch's default generator; its law is what can be judged, not its endpoint
    """

    library: str
    name: str
    run: Callable[[Eps, Tensor, Grid], Tensor]
    own_grid: bool = False
    noisy: bool = False

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


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
