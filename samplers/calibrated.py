"""A multistep solver whose few dozen numbers are fitted to a model.

Every step of a multistep method is x1 = a x + sum_j b_j V_j.  `samplers.calibration` chooses a, b and the
time points; what comes out is bound to the model, its guidance, the SDE and the number of steps.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samplers.angle import angle_form
from samplers.exponential import Nodes, nodes, scale
from samplers.rows import Row, run_rows
from scoresde.files import whole
from scoresde.types import SDE, Hook, Score

FORMAT = "scoresde calibrated solver 1"


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
