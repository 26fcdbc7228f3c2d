"""A multistep solver whose few dozen numbers are fitted to a model in closed form.

Every step of a multistep method is x1 = a x + sum_j b_j V_j.  `calibrate` runs the solver beside exact
paths of the model and chooses a and b of each step by least squares over samples and coordinates, so
that the state it has really reached goes to where the exact path is; a search moves the time points.
What comes out is bound to the model, its guidance, the SDE and the number of steps.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from samplers import grids
from samplers.angle import angle, angle_form
from samplers.exponential import Nodes, nodes, scale
from samplers.fitted import bend, least
from samplers.rows import Row, run_rows
from scoresde.files import whole
from scoresde.types import SDE, Hook, Score

FORMAT = "scoresde calibrated solver 1"
MEMORY = 4  # values a step may use


@dataclass(frozen=True)
class Calibration:
    """The numbers of a fitted solver.

    ts:     the grid, (n + 1,)
    a, b:   z1 = a z + sum_j b_j V_j of each step, z = x/rho, b newest first   (V, rho: `exponential`, with d)
    low, high: for each step, between which sizes |V|/sqrt(D) of a sample lay in calibration, widened by a fifth
               of the range to both sides
    shape:  of a sample;  sde, model: what it is bound to, as text
    held_out: RMS endpoint error a coordinate on paths not used for fitting, in data units;  held_out95: over the
              95 % of them with the smallest error;  uncalibrated95: that of `angle` on `grids.data_scale`
    """

    ts: list[float]
    d: float
    a: list[float]
    b: list[list[float]]
    low: list[float]
    high: list[float]
    shape: list[int]
    sde: str
    model: str
    held_out: float
    held_out95: float
    uncalibrated95: float

    @property
    def n(self) -> int:
        return len(self.a)

    def grid(self) -> Tensor:
        return torch.tensor(self.ts, dtype=torch.float64)

    def save(self, path: str | Path) -> None:
        with whole(path) as temporary:
            temporary.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")


def load_calibration(path: str | Path) -> Calibration:
    """A solver written by `Calibration.save`."""
    try:
        about = json.loads(Path(path).read_text())
    except ValueError as err:
        raise ValueError(f"{path} is not a calibrated solver: {err}") from err
    if not isinstance(about, dict) or about.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not a calibrated solver: its format is not {FORMAT!r}")
    try:
        return Calibration(**about)
    except TypeError as err:
        raise ValueError(f"{path} is a damaged calibrated solver ({err}); calibrate it again") from err


def calibrated(
    score: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    *,
    solver: Calibration,
    model: str = "",
    on_step: Hook | Sequence[Hook] = (),
    grad: bool = False,
    **run: Any,
) -> Tensor:
    """Run a fitted solver: z1 = a z + sum_j b_j V_j with the numbers of `solver`.

    ts: `solver.grid()`;  model: the name given to `calibrate`, must be the same
    Raises ValueError for another SDE, grid, model name or sample shape, and, after the run, where any
    sample's |V| lay outside the sizes met in calibration: another model, guidance or start.
    Other arguments as `euler_maruyama`.  N network calls.
    """
    for what, got, want in (("SDE", repr(sde), solver.sde), ("model", model, solver.model)):
        if got != want:
            raise ValueError(f"this solver was calibrated for the {what} {want!r}, not {got!r}; calibrate one for it")
    if list(x.shape[1:]) != solver.shape:
        raise ValueError(f"this solver was calibrated for samples {solver.shape}, got {list(x.shape[1:])}")
    if ts.shape != (solver.n + 1,) or not torch.equal(ts, solver.grid()):
        raise ValueError("this solver has its own grid; use ts = solver.grid()")
    at = nodes(angle_form(solver.d), sde, ts)
    sizes: list[Tensor] = []
    q, factor = scale(at)

    def watched(y: Tensor, t: Tensor) -> Tensor:
        s = score(y, t)
        i = len(sizes)
        V = torch.add(y, s, alpha=q[i] or 0.0).flatten(1)
        sizes.append(torch.linalg.vector_norm(V, dim=1).detach() * (float(factor[i]) / math.sqrt(V.shape[1])))
        return s

    x1 = run_rows(watched, sde, x, ts, lambda *_: _rows(at, solver), on_step=on_step, grad=grad, **run)
    seen = torch.stack(sizes).to("cpu", torch.float64)  # (N, B)
    outside = (seen < torch.tensor(solver.low)[:, None]) | (seen > torch.tensor(solver.high)[:, None])
    share = outside.any(0).double().mean()
    if float(share) > 0.25:
        i = int(outside.double().mean(1).argmax())
        raise ValueError(
            f"{100 * float(share):.0f} % of the samples left the range this solver was calibrated in (at step {i + 1} "
            f"|V|/sqrt(D) lay in [{float(seen[i].min()):.3g}, {float(seen[i].max()):.3g}], calibration in "
            f"[{solver.low[i]:.3g}, {solver.high[i]:.3g}]): is it the model, guidance and start it was made for?"
        )
    return x1


def _rows(at: Nodes, solver: Calibration) -> list[list[Row]]:
    q, V = scale(at)
    rows = []
    for i, (a, b) in enumerate(zip(solver.a, solver.b, strict=True)):
        weights = tuple(float(at.rho[i + 1] * V[i - j]) * w for j, w in enumerate(b))
        rows.append([Row(at.t[i], q[i], a * float(at.rho[i + 1] / at.rho[i]), weights)])
    return rows


def calibrate(
    score: Score,
    sde: SDE,
    x: Tensor,
    n: int,
    *,
    d: float = 0.5,
    t_end: float | None = None,
    model: str = "",
    searches: int | None = None,
    teacher: int = 96,
    progress: bool = True,
) -> Calibration:
    """Fit a solver of n steps to `score` on the paths that start at x.

    x:        starting states at sde.T, (B, ...), 256 or more; a quarter is held out
    d:        the data's standard deviation
    model:    a name for the model with its guidance, asked for again when the solver is used
    searches: trials of other time points (a smooth warp of `grids.data_scale`, by Nelder-Mead); default 12 n
    teacher:  steps of the exact paths (`angle` of order 4), good to about 1e-5 of the data

    n (searches + 2) + teacher network calls on the batch.  Raises ValueError where the held-out error (95 %) is not
    below that of the uncalibrated solver.
    """
    if n < 1 or len(x) < 32:
        raise ValueError(f"calibration needs n >= 1 and at least 32 starting states, got n = {n}, {len(x)} states")
    B = len(x)
    held = torch.arange(B) % 4 == 3
    path = _Path(score, sde, x, d, t_end, teacher)
    base = grids.data_scale(sde, n, d=d, t_end=t_end)
    searches = 12 * n if searches is None else searches

    def errors(out: Tensor) -> Tensor:
        """Of each sample, RMS over coordinates, in data units."""
        return (out - path.end).flatten(1).square().mean(1).sqrt().double() / float(sde.alpha(base[-1]))

    plain = errors(angle(score, sde, x, base, d=d))
    # samples beside a separatrix, where paths part, would take all the weight of a square
    rows = ~held & (plain.cpu() <= torch.quantile(plain[~held].cpu(), 0.95))

    bar = tqdm(total=searches, desc="calibrating", disable=not progress)

    def objective(warp: np.ndarray) -> float:
        bar.update(1)
        ts = bend(sde, base, warp)
        if bool((ts.diff() >= 0).any()):
            return math.inf
        return float(errors(_fit(score, sde, path, ts, d, rows)[0])[rows].square().mean().sqrt())

    warp, _ = least(objective, min(n - 1, 6), searches)
    bar.close()
    ts = bend(sde, base, warp)
    out, a, b, low, high = _fit(score, sde, path, ts, d, rows)

    def rms(e: Tensor, share: float) -> float:
        return float(e[held].sort().values[: max(1, math.ceil(share * int(held.sum())))].square().mean().sqrt())

    fitted, before = errors(out), rms(plain, 0.95)
    found = Calibration(
        ts.tolist(),
        d,
        a,
        b,
        low,
        high,
        list(x.shape[1:]),
        repr(sde),
        model,
        rms(fitted, 1.0),
        rms(fitted, 0.95),
        before,
    )
    if not found.held_out95 < before:
        raise ValueError(
            f"on held-out paths the calibrated solver's error is {found.held_out95:.3g}, the uncalibrated one's "
            f"{before:.3g}: too few starting states ({B}), or steps enough to need no calibration"
        )
    return found


class _Path:
    """Paths of the flow by many steps, at any time in between."""

    def __init__(self, score: Score, sde: SDE, x: Tensor, d: float, t_end: float | None, n: int) -> None:
        ts = grids.data_scale(sde, n, d=d, t_end=t_end)
        self.d, states = d, [x]
        self.start = x
        self.end = angle(score, sde, x, ts, d=d, order=4, on_step=lambda i, t, x: states.append(x))
        at = nodes(angle_form(d), sde, ts)
        self.angle = torch.atan(at.r / d)
        self.z = torch.stack([y / float(rho) for y, rho in zip(states, at.rho, strict=True)])

    def at(self, r: float) -> Tensor:
        """z at sigma/alpha = r, by the polynomial in the angle through the six nearest points."""
        th = math.atan(r / self.d)
        first = int((self.angle > th).sum()) - 3
        first = max(0, min(len(self.angle) - 6, first))
        near = self.angle[first : first + 6].tolist()
        w = [math.prod((th - q) / (p - q) for q in near if q != p) for p in near]
        return torch.einsum("k,k...->...", self.z.new_tensor(w), self.z[first : first + 6])


def _fit(
    score: Score, sde: SDE, path: _Path, ts: Tensor, d: float, rows: Tensor
) -> tuple[Tensor, list[float], list[list[float]], list[float], list[float]]:
    """Least squares step by step, along the states really reached; the end state, a, b and the range of |V|."""
    at = nodes(angle_form(d), sde, ts)
    q, factor = scale(at)
    x, a, b, low, high = path.start, [], [], [], []
    memory: list[Tensor] = []
    with torch.no_grad():
        for i in range(len(ts) - 1):
            V = torch.add(x, score(x, ts[i]), alpha=q[i] or 0.0) * float(factor[i])
            memory = [V, *memory][:MEMORY]
            size = V.flatten(1).square().mean(1).sqrt()
            margin = 0.2 * float(size.max() - size.min())
            low.append(max(0.0, float(size.min()) - margin))
            high.append(float(size.max()) + margin)
            z = x / float(at.rho[i])
            known = torch.stack([z, *memory]).double()
            target = path.at(float(at.r[i + 1])).double()
            F = known[:, rows].flatten(1)
            G, g = F @ F.T, F @ (target - z.double())[rows].flatten()
            G = G + torch.diag(1e-10 * G.diagonal())
            c = torch.linalg.solve(G.cpu(), g.cpu())
            a.append(1 + float(c[0]))
            b.append(c[1:].tolist())
            x = (z + torch.einsum("k,k...->...", c.to(known), known).to(x)) * float(at.rho[i + 1])
    return x, a, b, low, high
