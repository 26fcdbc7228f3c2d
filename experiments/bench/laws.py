"""Distances of laws: what samplers draw against the truth, always with what exact draws of that number give.

In data units, of n samples:

    w2       sliced 2-Wasserstein distance to n fresh exact draws; its floor is that of two exact sets
    frechet  |m - m'|^2 + tr(C + C' - 2 (C^(1/2) C' C^(1/2))^(1/2)) to the exact mean m' and covariance C'
             (Dowson & Landau 1982); its floor is that of exact draws

Both floors are means over eight sets.  A distance within a tenth of its floor is one that n samples cannot see.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from experiments.bench.methods import Case, Method, drawing, steps_within
from experiments.common import Claim
from experiments.problems import Problem, moments, sliced_w2
from scoresde import counted

NOISY = ("angle:tau=0.5", "angle:tau=1.0", "sde_dpmpp", "sa_solver")
"""Ours, unless others are named."""

SEEN = 1.1
"""Over this share of its floor a distance is seen."""


@dataclass(frozen=True)
class Law:
    """Distances of the law of one run of `samples` samples, and their floors; `nfe` the budget, `calls` counted."""

    problem: str
    library: str
    sampler: str
    grid: str
    nfe: int
    calls: int
    samples: int
    w2: float
    w2_floor: float
    frechet: float
    frechet_floor: float


class Truth:
    """The exact law of a problem at its end, and the floors of n samples."""

    def __init__(self, p: Problem, n: int, seed: int) -> None:
        self.problem, self.n, self.seed = p, n, seed
        alpha, sigma = (float(f(torch.tensor(p.t_end, dtype=torch.float64))) for f in (p.sde.alpha, p.sde.sigma))
        self.mean, C = moments(p.target)
        self.root = _root(C + (sigma / alpha) ** 2 * torch.eye(len(C), dtype=C.dtype))
        self.fresh = self._exact(0)
        pairs = [self._exact(k) for k in range(1, 9)]
        self.frechet_floor = sum(map(self.frechet, pairs)) / len(pairs)
        self.w2_floor = sum(map(self.w2, pairs)) / len(pairs)

    def _exact(self, k: int) -> Tensor:
        return self.problem.data_units(self.problem.draw(self.n, 20_000 + 100 * self.seed + k, self.problem.t_end))

    def w2(self, y: Tensor) -> float:
        return sliced_w2(y, self.fresh[: len(y)], seed=self.seed)

    def frechet(self, y: Tensor) -> float:
        y = y.flatten(1)
        C = y.T.cov().reshape(self.root.shape)
        middle = torch.linalg.eigvalsh(self.root @ C @ self.root).clamp(min=0).sqrt().sum()
        apart = (y.mean(0) - self.mean).square().sum()
        return float(apart + y.var(0).sum() + self.root.square().sum() - 2 * middle)


def _root(C: Tensor) -> Tensor:
    e, U = torch.linalg.eigh(C)
    return U * e.clamp(min=0).sqrt() @ U.T


def laws(
    p: Problem, methods: Sequence[Method], budgets: Sequence[int], truth: Truth, share: int = 8, keep: int = 2
) -> list[Law]:
    """Every method on the `share`-th part of the samples; with new noise on all of them, on a sampler's best grids.

    Best at a budget are the `keep` grids of least distance on that part, by either distance.
    """
    x = p.start(truth.n, truth.seed + 77)
    few = x[: max(len(x) // share, 2)]
    case = Case(p.name, p.sde, p.score, p.t_end, p.sigma_data, few, few)
    within = steps_within(case)
    tried: dict[tuple[str, str, int], list[tuple[Law, Method, int]]] = {}

    def run(method: Method, nfe: int, steps: int, x: Tensor, seed: int) -> Law:
        score = counted(p.score)
        try:
            with drawing(seed):
                y = p.data_units(method.run(case, score, x, steps))
            w2, frechet = (truth.w2(y), truth.frechet(y)) if bool(torch.isfinite(y).all()) else (math.inf, math.inf)
        except FloatingPointError:
            w2 = frechet = math.inf
        if score.calls > nfe:
            raise RuntimeError(f"{method.name} on {method.grid} used {score.calls} calls of {nfe}")
        who = p.name, method.library, method.name, method.grid
        return Law(*who, nfe, score.calls, len(x), w2, truth.w2_floor, frechet, truth.frechet_floor)

    for method in tqdm(methods, desc=f"{p.name}: laws", unit="method", leave=False, mininterval=1):
        for nfe in budgets:
            if (steps := within(method, nfe)) is not None:
                key = (method.library, method.name, nfe)
                tried.setdefault(key, []).append((run(method, nfe, steps, few, truth.seed), method, steps))
    out = []
    for (*_, nfe), group in tqdm(tried.items(), desc=f"{p.name}: best grids", unit="run", leave=False, mininterval=1):
        best = [sorted(group, key=lambda g: getattr(g[0], what))[:keep] for what in ("w2", "frechet")]
        again = {method: steps for found in best for _, method, steps in found}
        out += [run(method, nfe, steps, x, truth.seed + 1) for method, steps in again.items()]
    return out


def least(rows: Sequence[Law], what: str) -> Law | None:
    """The row of least distance."""
    found = [r for r in rows if math.isfinite(getattr(r, what))]
    return min(found, key=lambda r: getattr(r, what), default=None)


def show(rows: Sequence[Law], budgets: Sequence[int]) -> None:
    """Ours, and the best of each library, on the best grid by each distance, with the floor beside."""
    first = rows[0]
    print(f"\n{first.problem}: laws of {first.samples} samples each on its best grid; ours, and each library's best")
    for nfe in budgets:
        groups: dict[str, list[Law]] = {}
        for r in rows:
            if r.nfe == nfe:
                groups.setdefault(r.sampler if r.library == "scoresde" else f"best of {r.library}", []).append(r)
        for name, group in groups.items():
            told = [f"{nfe:>4} calls  {name:<22}"]
            for what, said in (("w2", "sliced W2"), ("frechet", "Frechet")):
                if (b := least(group, what)) is not None:
                    floor = getattr(b, f"{what}_floor")
                    who = b.grid if b.library == "scoresde" else f"{b.sampler}, {b.grid}"
                    told.append(f"{said} {getattr(b, what):.4g} (exact {floor:.4g})  {who:<40}")
            print(" ".join(told).rstrip())


def claims(rows: Sequence[Law], name: str) -> list[Claim]:
    """Ours over the best of all peers at equal calls; distances below `SEEN` floors count as that much."""
    out = []
    for where in dict.fromkeys(r.problem for r in rows):
        for nfe in sorted({r.nfe for r in rows}):
            here = [r for r in rows if (r.problem, r.nfe) == (where, nfe)]
            for what, floor in (("w2", "w2_floor"), ("frechet", "frechet_floor")):
                mine = least([r for r in here if r.library == "scoresde" and r.sampler == name], what)
                rival = least([r for r in here if r.library != "scoresde"], what)
                if mine and rival:
                    e, e1 = (max(getattr(r, what), SEEN * getattr(r, floor)) for r in (mine, rival))
                    said = {"w2": "sliced W2", "frechet": "Frechet"}[what]
                    text = f"{where}, {nfe} calls: {said} of {name} over that of {rival.library} {rival.sampler}"
                    out.append(Claim(text, e / e1, "<=", 1.0))
    return out
