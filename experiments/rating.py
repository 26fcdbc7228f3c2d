"""Items rated chunk by chunk: each chunk a file, so that a rating survives being killed and is shared by processes.

A chunk is `batch` items in the order of a permutation drawn from the seed, so that the first ones are a fair sample.
What it holds depends on the weights, the data and the options, whose hash names its folder; never on who computes it.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import scoresde
from scoresde import Mixture, Model, Streams, bounds, change, code_length, gaussian, gaussian_of, prior_log_prob
from scoresde.checkpoint import describe, read, save
from scoresde.discrete import Dequantizer, dequantize, fitted, importance_bound, noise_bias, truncated_normal, uniform
from scoresde.flow import FIXED
from scoresde.report import estimate
from scoresde.types import number

MIN = 30  # items before a half-width is believed
VALUE, BOUND, DISCRETE, REFERENCE = range(4)  # what noise is for
DRAWS = 2  # of dequantisation, and of probes, in the repeats
DEQUANTIZERS: dict[str, Callable[[Model], Dequantizer]] = {
    "uniform": lambda m: uniform(m.sde),
    "fitted": lambda m: fitted(m, m.sde),
    "truncated": lambda m: truncated_normal(m.sde),
}
Part = dict[str, Tensor]


@dataclass(frozen=True)
class How:
    """All options that a value depends on."""

    method: str = "multistep"
    tol: float = 1e-3
    steps: int = 32
    probes: int = 4
    dequantize: str = "uniform"
    importance: int = 1
    calls: int = 64
    repeats: int = 64
    batch: int = 64
    seed: int = 0

    def solver(self, finer: bool) -> dict[str, Any]:
        """The arguments of `change`; finer: half the tolerance, twice the steps."""
        how: dict[str, Any] = {"method": self.method, "tol": self.tol / (1 + finer), "steps": self.steps * (1 + finer)}
        if self.method == "apart" and self.probes:
            how["nodes"] = 63 if finer else 31
        return how

    def __str__(self) -> str:
        size = f"tol {self.tol:g}" if self.by_tolerance else f"{self.steps} steps"
        trace = f"{self.probes} probes" if self.probes else "exact trace"
        draws = "" if self.importance == 1 else f" ({self.importance} importance draws)"
        return f"{self.dequantize} dequantisation{draws}, {self.method}, {size}, {trace}"

    @property
    def by_tolerance(self) -> bool:
        return self.method not in ("multistep", *FIXED)


@dataclass(frozen=True)
class Task:
    """Items x (N, ...) of integer levels, rated by a model under labels (N,) or none; `prepare` makes one."""

    model: Model
    x: Tensor
    labels: Tensor | None
    grid: tuple[int, float, float]  # levels, low, high
    how: How
    order: Tensor  # items to rate, in the order of rating
    reference: Mixture  # N(m, C) of all items, dequantised
    folder: Path  # of the parts

    @property
    def D(self) -> int:
        return self.x[0].numel()

    @property
    def chunks(self) -> int:
        return math.ceil(len(self.order) / self.how.batch)

    def items(self, rows: list[int]) -> tuple[Model, Tensor]:
        model = self.model if self.labels is None else self.model.given(self.labels[rows])
        return model, self.x[rows].to(_device(self.model))

    def span(self, c: int) -> tuple[int, int]:
        return c * self.how.batch, min((c + 1) * self.how.batch, len(self.order))

    def file(self, c: int) -> Path:
        first, last = self.span(c)
        return self.folder / f"{first}-{last}.safetensors"

    def read(self, c: int) -> Part | None:
        """The chunk's part, or None if it is not there or not as it was written."""
        try:
            part, header = read(self.file(c))
        except (OSError, ValueError):
            return None
        return part if header.get("digest") == _digest(part) else None

    def write(self, c: int, part: Part) -> None:
        save(self.file(c), part, {"digest": _digest(part)})


def prepare(
    model: Model,
    x: Tensor,
    labels: Tensor | None,
    grid: tuple[int, float, float],
    how: How,
    out: Path,
    limit: int | None,
) -> Task:
    """The task with its order, reference and key; limit: how many items are rated, None for all."""
    order = torch.from_numpy(np.random.default_rng(how.seed).permutation(len(x)))[:limit]
    key = _key(model, x, labels, grid, how)
    return Task(model, x, labels, grid, how, order, _reference(x, grid, how), out / "parts" / key)


def streams(seed: int, rows: list[int], *purpose: int) -> Streams:
    """The streams of these items for one purpose; others for every purpose, draw and repeat."""
    return Streams(seed + sum((p + 1) << (64 + 16 * i) for i, p in enumerate(purpose)), rows)


def rate(
    task: Task, rows: list[int], draw: int = 0, probe: int = 0, *, finer: bool = False, fixed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """-log2 P(k)/D of these items under the SDE's prior and the fitted one, (B,) each, and the terms (K, B) in nats.

    draw, probe: which dequantisation and which probes; fixed: the same probes at every node
    """
    how, sde = task.how, task.model.sde
    model, k = task.items(rows)
    shift: list[Tensor] = []

    def log_prob(y: Tensor) -> Tensor:
        end = change(
            model, sde, y, sde.t_min, number(sde.T), d=model.sigma_data, probes=how.probes or None,
            fresh=False if fixed else None, noise=streams(how.seed, rows, VALUE, draw, 1 + probe), **how.solver(finer),
        )  # fmt: skip
        own = prior_log_prob(sde, end.x)
        shift.append((task.reference.log_prob(end.x, sde, number(sde.T)) - own).double())
        return own - end.log_p

    q, noise = DEQUANTIZERS[how.dequantize](model), streams(how.seed, rows, VALUE, draw, 0)
    code = code_length(log_prob, k, *task.grid, dequantizer=q, K=how.importance, noise=noise)
    nats = importance_bound(code.terms + torch.stack(shift), how.importance)
    return code.bits_per_dim.cpu(), -nats.cpu() / (task.D * math.log(2)), code.terms.cpu()


def bounded(task: Task, rows: list[int]) -> Part:
    """The variational bound with its terms and the I-MMSE estimate, bits/dim, of the draw that `rate` rates first."""
    how, sde, bits = task.how, task.model.sde, 1 / (task.D * math.log(2))
    model, k = task.items(rows)
    levels, low, high = task.grid
    w = (high - low) / levels
    centre = low + (k.to(torch.get_default_dtype()) + 0.5) * w
    alpha = float(sde.alpha(number(sde.t_min)))
    y, log_q = DEQUANTIZERS[how.dequantize](model)(centre, w, streams(how.seed, rows, VALUE, 0, 0))()
    found = bounds(model, sde, y / alpha, task.reference, calls=how.calls, noise=streams(how.seed, rows, BOUND))
    density = log_q.cpu() + task.D * math.log(alpha)  # of the draw, in the data's own scale
    t = torch.maximum(sde.time(number(-math.log(w / 10))), number(sde.t_min))
    noise = streams(how.seed, rows, DISCRETE)
    bins = bounds(model, sde, centre, task.reference, t=t, bins=task.grid, calls=how.calls, noise=noise)
    prior, diffusion, reconstruction, immse = (
        v.cpu().double() for v in (found.prior, found.diffusion, found.reconstruction, found.immse)
    )
    return {
        "vlb_prior": bits * prior,
        "vlb_diffusion": bits * diffusion,
        "vlb_reconstruction": bits * (reconstruction + density),
        "immse": bits * (immse + density),
        "discrete": bits * bins.total.cpu().double(),
    }


def chunk(task: Task, c: int) -> Part:
    """All that is measured on the items of chunk c, bits/dim in float64; the first `repeats` items of all are repeated.

    value, fitted (n,):   by the ODE, with the SDE's own prior and the data-fitted one
    repeats (m, 2, 2):    draws, probes; (m, 2, 1) with an exact trace
    coarse, fine (m, 2):  value and fitted, and both refined, with probes that are the same at every node
    lift (m,):            how much trace noise may lift an importance-weighted value
    """
    how = task.how
    first, last = task.span(c)
    rows = task.order[first:last].tolist()
    own, fit, terms = rate(task, rows)
    part = {"value": own, "fitted": fit}
    some = rows[: max(0, how.repeats - first)]
    if some:
        again = {(0, 0): (own[: len(some)], terms[:, : len(some)])}
        probes = DRAWS if how.probes else 1
        for j, k in ((j, k) for j in range(DRAWS) for k in range(probes) if j or k):
            again[j, k] = rate(task, some, j, k)[::2]
        part["repeats"] = torch.stack(
            [torch.stack([again[j, k][0] for k in range(probes)], 1) for j in range(DRAWS)], 1
        )
        part["coarse"] = torch.stack(rate(task, some, fixed=True)[:2], 1)
        part["fine"] = torch.stack(rate(task, some, finer=True, fixed=True)[:2], 1)
        if how.importance > 1 and how.probes:
            std = (again[0, 0][1] - again[0, 1][1]).std(0) / math.sqrt(2)
            part["lift"] = noise_bias(std, how.importance) / (task.D * math.log(2))
    if how.calls:
        part |= bounded(task, rows)
    return {name: v.detach().double().contiguous().clone() for name, v in part.items()}


def rated(
    task: Task, half_width: float | None, rank: int, world: int, show: Callable[[Tensor], None]
) -> list[Part] | None:
    """The parts of the first chunks, up to the wanted half-width or to the end; None for ranks that others report for.

    Rank r computes chunks r, r + world, ...  Rank 0 then waits as long as a chunk of its own took, and computes what
    still is not there: another process may be gone, and twice the same part does no harm.
    """
    ready: list[Part] = []

    def finished() -> bool:
        """Whether the chunks that are there, in order, are enough."""
        while len(ready) < task.chunks and not _enough(ready, half_width):
            part = task.read(len(ready))
            if part is None:
                return False
            ready.append(part)
            show(torch.cat([p["value"] for p in ready]))
        return True

    longest = 0.0
    for c in range(rank, task.chunks, world):
        if finished():
            break
        if c >= len(ready) and task.read(c) is None:
            tick = time.monotonic()
            task.write(c, chunk(task, c))
            longest = max(longest, time.monotonic() - tick)
    if rank:
        return None
    until = time.monotonic() + 1.5 * longest
    while not finished():
        if world > 1 and time.monotonic() < until:
            time.sleep(0.1)
        else:
            task.write(len(ready), chunk(task, len(ready)))
    return ready


def _enough(ready: list[Part], half_width: float | None) -> bool:
    if half_width is None or not ready:
        return False
    value = torch.cat([p["value"] for p in ready])
    return len(value) >= MIN and estimate(value).half_width <= half_width


def _reference(x: Tensor, grid: tuple[int, float, float], how: How) -> Mixture:
    y = dequantize(x.double(), *grid, streams(how.seed, list(range(len(x))), REFERENCE))
    N, D = len(y), y[0].numel()
    if N < 4:
        return gaussian(y.mean(0), var=float(y.var()))
    return gaussian_of(y, None if N > D and D <= 1024 else min(256, N // 2, D - 1))


def _key(model: Model, x: Tensor, labels: Tensor | None, grid: tuple[int, float, float], how: How) -> str:
    """A hash of everything the values depend on, the code included."""
    h = hashlib.sha256()
    assert isinstance(model.net, nn.Module)
    for tensors in (model.net.state_dict(), {"x": x}, {} if labels is None else {"y": labels}):
        h.update(_digest(tensors).encode())
    facts = {
        "model": describe(model), "grid": grid, "how": asdict(how), "torch": torch.__version__,
        "device": _device(model).type, "threads": torch.get_num_threads(), "dtype": str(torch.get_default_dtype()),
    }  # fmt: skip
    h.update(json.dumps(facts, sort_keys=True).encode())
    for file in [*sorted(Path(scoresde.__file__).parent.rglob("*.py")), Path(__file__)]:
        h.update(file.read_bytes())
    return h.hexdigest()[:16]


def _device(model: Model) -> torch.device:
    return next(model.net.parameters()).device  # type: ignore[attr-defined]


def _digest(tensors: Part) -> str:
    h = hashlib.sha256()
    for name in sorted(tensors):
        v = tensors[name].detach().cpu().contiguous()
        h.update(f"{name} {v.dtype} {tuple(v.shape)}".encode())
        h.update(v.reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
