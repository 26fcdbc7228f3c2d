"""A grid fitted once to a model by a pilot run, for any number of steps; a small object that can be saved."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samplers import grids
from samplers.angle import angle, angle_form
from samplers.exponential import nodes, scale
from scoresde.files import whole
from scoresde.types import SDE, Score

ORDERS = (2, 3, 4)
FORMAT = "scoresde fitted grid 1"


@dataclass(frozen=True, eq=False)
class FittedGrid:
    """Densities of nodes along u = log r for each order; `times(sde, n, order)` makes a grid of them.

    log_r:   (M,) decreasing, from sde.T to the end
    density: (3, M), for orders 2, 3, 4: proportional to the (order + 1)-th root of the error a step of
             unit length in log r would make, so that equal shares of it make equal errors
    d:       the data's standard deviation used;  sde: the SDE it was fitted to, as text
    """

    log_r: Tensor
    density: Tensor
    d: float
    sde: str

    def times(self, sde: SDE, n: int, order: int) -> Tensor:
        """n steps, (n + 1,) float64, each with the same share of the density."""
        if repr(sde) != self.sde:
            raise ValueError(f"this grid was fitted to {self.sde}, not to {sde!r}; fit one with fit_grid")
        if n < 1:
            raise ValueError(f"a grid needs at least one step, got n = {n}")
        fine = torch.linspace(0, 1, 4001, dtype=torch.float64) * (self.log_r[-1] - self.log_r[0]) + self.log_r[0]
        density = self.density[min(max(order, ORDERS[0]), ORDERS[-1]) - ORDERS[0]]
        w = torch.from_numpy(np.interp(-fine, -self.log_r, density))
        share = torch.cat([w.new_zeros(1), ((w[1:] + w[:-1]) / 2).cumsum(0)])
        log_r = torch.from_numpy(np.interp(np.linspace(0, 1, n + 1), share / share[-1], fine))
        return grids.of_levels(sde, torch.exp(log_r))

    def save(self, path: str | Path) -> None:
        about = {"format": FORMAT, "sde": self.sde, "d": self.d, "log_r": self.log_r.tolist()}
        with whole(path) as temporary:
            temporary.write_text(json.dumps({**about, "density": self.density.tolist()}, indent=1) + "\n")


def load_grid(path: str | Path) -> FittedGrid:
    """A grid written by `FittedGrid.save`."""
    try:
        about = json.loads(Path(path).read_text())
    except ValueError as err:
        raise ValueError(f"{path} is not a fitted grid: {err}") from err
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{path} is not a fitted grid: its format is not {FORMAT!r}")
    log_r, density = (torch.tensor(about[k], dtype=torch.float64) for k in ("log_r", "density"))
    return FittedGrid(log_r, density, float(about["d"]), about["sde"])


def fit_grid(
    score: Score, sde: SDE, x: Tensor, *, d: float = 0.5, t_end: float | None = None, n: int = 64
) -> FittedGrid:
    """Fit to the paths of x (32 states at sde.T are enough): n network calls.

    Along each path V(u) (`samplers.exponential`, the form of `angle`) is known at n points.  A step of
    order p and length h in log r makes an error of about h^(p + 1) |V^(p)(u)| (du/dlog r)^p r d/(d^2 + r^2), with
    the p-th derivative taken from divided differences and of its sizes over the samples the 0.8 quantile;
    no place gets less than a fiftieth of the densest.
    """
    if n < 16:
        raise ValueError(f"a pilot run needs at least 16 steps to see derivatives, got {n}")
    ts = grids.data_scale(sde, n, d=d, t_end=t_end)
    form = angle_form(d)
    at = nodes(form, sde, ts)
    q, size = scale(at)
    seen: list[Tensor] = []

    def watched(y: Tensor, t: Tensor) -> Tensor:
        s = score(y, t)
        k = len(seen)
        seen.append((torch.add(y, s, alpha=q[k] or 0.0) * float(size[k])).flatten(1).detach().to("cpu", torch.float64))
        return s

    angle(watched, sde, x, ts, d=d, order=4)
    V, log_r, u = torch.stack(seen), torch.log(at.r), form.u(sde, at.r)
    return FittedGrid(log_r, torch.stack([_density(V, log_r, u[:n], d, p) for p in ORDERS]), d, repr(sde))


def _density(V: Tensor, log_r: Tensor, u: Tensor, d: float, p: int) -> Tensor:
    """V (n, B, D) at u (n,) -> density at every log_r (n + 1,)."""
    D = V
    for k in range(1, p + 1):
        D = (D[1:] - D[:-1]) / (u[k:] - u[:-k])[:, None, None]
    size = torch.quantile(D.square().mean(2).sqrt(), 0.8, dim=1)
    middle = log_r[: len(u)].unfold(0, p + 1, 1).mean(1)
    r = torch.exp(middle)
    slope = 1.2 * d * r / (r + 1.2 * d) ** 2  # du/dlog r
    log_w = torch.log((size * slope**p * r * d / (d**2 + r**2)).clamp(min=1e-300)) / (p + 1)
    smooth = torch.nn.functional.pad(log_w[None, None], (2, 2), mode="replicate")[0, 0].unfold(0, 5, 1).mean(1)
    w = torch.exp(smooth - smooth.max()).clamp(min=0.02)
    return torch.from_numpy(np.interp(-log_r, -middle, w))
