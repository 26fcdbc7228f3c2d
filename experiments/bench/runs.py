"""Errors of endpoints: what each method makes of a case within its budget, and what is kept of it."""

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from experiments import peers as others
from experiments.bench.methods import Case, Method, steps_within
from experiments.problems import Problem
from scoresde import Streams, counted, flow, prior_sample
from scoresde.checkpoint import load_model
from scoresde.files import whole

R = TypeVar("R")


@dataclass(frozen=True)
class Row:
    """One run of `samples` samples: `nfe` the budget, `calls` what was counted."""

    problem: str
    library: str
    sampler: str
    grid: str
    nfe: int
    calls: int
    samples: int
    rms95: float
    rms: float


def measure(case: Case, runs: Sequence[tuple[Method, int]]) -> list[Row]:
    """Each method within its budget of calls, by the error of its endpoints; left out where not even a step fits."""
    rows, within, done = [], steps_within(case), {}
    for method, nfe in tqdm(runs, desc=case.name, unit="run", leave=False, mininterval=1):
        steps = within(method, nfe)
        if steps is None:
            continue
        key = (method, steps)
        if key not in done:
            score = counted(case.score)
            try:
                x1 = method.run(case, score, case.x, steps)
                done[key] = (score.calls, len(x1), *case.errors(x1))
            except FloatingPointError:
                done[key] = (score.calls, len(case.x), math.inf, math.inf)
        if done[key][0] > nfe:
            raise RuntimeError(f"{method.name} on {method.grid} used {done[key][0]} calls of {nfe}")
        rows.append(Row(case.name, method.library, method.name, method.grid, nfe, *done[key]))
    return rows


def every(methods: Sequence[Method], budgets: Sequence[int]) -> list[tuple[Method, int]]:
    return [(method, nfe) for method in methods for nfe in budgets]


def screened(case: Case, methods: Sequence[Method], budgets: Sequence[int], share: int = 4) -> list[Row]:
    """`measure` of every method on a quarter of the samples, and on all of them where it may be a library's best.

    That is: at each budget within twice the error of the library's best on the quarter, and its best ten anyway,
    on grids it ships and on others' apart.  The rows of the others say how many samples they are of.
    """
    n = max(1, len(case.x) // share)
    rows = measure(replace(case, x=case.x[:n], exact=case.exact[:n]), every(methods, budgets))
    by_name = {(m.library, m.name, m.grid): m for m in methods}
    again = []
    for nfe in budgets:
        groups: dict[tuple[str, bool], list[Row]] = {}
        for r in rows:
            if r.nfe == nfe:
                groups.setdefault((r.library, others.shipped(r.library, r.grid)), []).append(r)
        for group in groups.values():
            here = sorted(group, key=lambda r: r.rms95)
            near = [r for k, r in enumerate(here) if k < 10 or r.rms95 <= 2 * here[0].rms95]
            again += [(by_name[r.library, r.sampler, r.grid], nfe) for r in near if math.isfinite(r.rms95)]
    full = measure(case, again)
    settled = {(r.library, r.sampler, r.grid, r.nfe) for r in full}
    return [r for r in rows if (r.library, r.sampler, r.grid, r.nfe) not in settled] + full


def best(rows: Iterable[Row]) -> Row | None:
    """The row of least rms95 among those of the most samples."""
    found = [r for r in rows if math.isfinite(r.rms95)]
    most = max((r.samples for r in found), default=0)
    return min((r for r in found if r.samples == most), key=lambda r: r.rms95, default=None)


def exact_case(p: Problem, n: int, seed: int = 0, folder: Path | None = None) -> Case:
    x = p.start(n, seed)
    return Case(p.name, p.sde, p.score, p.t_end, p.sigma_data, x, p.endpoints(x, folder))


def model_case(file: Path, n: int, seed: int) -> Case:
    """A trained network in float64, its classes in turn; the reference is Dormand-Prince at 1e-8."""
    model, header = load_model(file)
    about = header.get("data")
    if about is None or "shape" not in about:
        raise ValueError(f"{file} does not say the shape of its data; train it with extra={{'data': {{'shape': ...}}}}")
    model.net.double()  # type: ignore[attr-defined]
    labels = torch.arange(n) % model.classes if model.classes else None

    def score(x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            return (model if labels is None else model.given(labels[: len(x)]))(x, t)

    sde = model.sde
    x = prior_sample(sde, torch.empty(n, *about["shape"], dtype=torch.float64), Streams(seed, n))
    exact = flow(score, sde, x, sde.T, sde.t_min, rtol=1e-8, atol=1e-8)
    return Case("model", sde, score, sde.t_min, model.sigma_data, x, exact)


def versions(libraries: Iterable[str]) -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name.replace('_', '-'))}" for name in libraries)


def digest(case: Case) -> str:
    """What a peer's rows depend on besides its version: starts, ends (to five digits), and the code that runs it."""
    key = hashlib.sha256()
    for file in sorted(Path(others.__file__).parent.glob("*.py")):
        key.update(file.read_bytes())
    key.update(case.x.contiguous().numpy().tobytes())
    key.update(f"{case.sde} {case.t_end} {float(case.exact.square().mean()):.5g}".encode())
    return f"{len(case.x)} samples, {key.hexdigest()[:16]}"


def kept(file: Path, key: str, make: Callable[[], list[R]], kind: type[R]) -> list[R]:
    """Rows of an earlier run with the same key, or made now and kept."""
    if file.exists():
        old = json.loads(file.read_text())
        if old["key"] == key:
            return [kind(**row) for row in old["rows"]]
    rows = make()
    with whole(file) as temporary:
        temporary.write_text(json.dumps({"key": key, "rows": [asdict(r) for r in rows]}))  # type: ignore[call-overload]
    return rows
