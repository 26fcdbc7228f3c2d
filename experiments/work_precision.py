"""Work and precision: error of the endpoint against network calls, on problems whose flow is known.

    python -m experiments.work_precision                      ours, on the three problems of the claims
    python -m experiments.work_precision --peers              and diffusers, k-diffusion, azula, torchdiffeq beside
    python -m experiments.work_precision --problems digits --samplers heun,angle:order=4 --nfe 5,10,20
    python -m experiments.work_precision --peers --samplers searched,calibrated --ours searched   what fitting gains
    python -m experiments.work_precision --model out/quickstart/model.safetensors

Every sampler starts from the same exact draws and runs on every grid with as many steps as its counted
calls allow; the best grid *with hindsight* is shown, for ours as for the peers'.  A peer runs on the
other libraries' grids, too, which flatters it; what it does on the grids it ships is shown apart.
`--ours` (on `--grid`) is held against the best of all peers on the best of all grids.
Claims, on 2d, 64d and 16d at 10, 20 and 50 calls: its error at most half the best peer's; and from 20
calls on, at most half the calls for the best peer's error.  On the six problems of `auto`: within 5 % of
the best peer at every budget, and strictly best at two thirds.  Without --peers there is nothing to claim.
To expect with --ours searched: error ratios 0.03 to 0.47, all hold; share of the calls 0.45 to 0.75, two of nine
hold; on the six of `auto` at worst 1.006, strictly best in 41 of 42.  Nothing fitted (angle on data_scale): 0.09
to 0.95, two of nine fail, at 10 calls; 1.4 to 4.0 at worst on four of the six; 28 of 42.

The error is log10 of rms95 in data units (see `experiments.problems`) against the exact flow from the
same noise.  `--law N` adds the sliced 2-Wasserstein distance of N samples to N fresh exact ones, always
with what two exact sets give beside it.  Writes OUT/work_precision.csv and .png; endpoints of the
exact flow and results of the peers are kept in OUT and taken from there the second time.
"""

import argparse
import ast
import csv
import hashlib
import importlib.metadata
import inspect
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import samplers
from experiments import peers as others
from experiments.common import Claim, parser, report, start
from experiments.problems import AUTO, NAMES, TABLE, Problem, problem, rms, rms95, sliced_w2
from samplers import grids
from scoresde import Streams, counted, flow, prior_sample
from scoresde.checkpoint import load_model
from scoresde.files import whole
from scoresde.types import SDE, Score

NFE = (5, 8, 10, 15, 20, 35, 50)
CLAIMED = (10, 20, 50)


@dataclass(frozen=True, eq=False)
class Case:
    """A problem with its starts x at sde.T and the exact flow's endpoints at t_end."""

    name: str
    sde: SDE
    score: Score
    t_end: float
    sigma_data: float
    x: Tensor
    exact: Tensor

    def errors(self, x1: Tensor) -> tuple[float, float]:
        """rms95 and rms in data units."""
        alpha = float(self.sde.alpha(torch.tensor(self.t_end, dtype=torch.float64)))
        return rms95(x1 / alpha, self.exact / alpha), rms(x1 / alpha, self.exact / alpha)


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


@dataclass(frozen=True)
class Method:
    """Something that runs within a budget: steps(n) -> run(case) -> x at t_end."""

    library: str
    name: str
    grid: str
    run: Callable[[Case, Score, Tensor, int], Tensor]  # (case, score, x at T, steps)


def fitting(calls: Callable[[int], int | None], nfe: int) -> int | None:
    """The largest number of steps with calls(steps) <= nfe; None if not even one step has.

    calls(steps) is counted on a run, None where the method refuses that number of steps.
    """
    return next((n for n in range(nfe, 0, -1) if (c := calls(n)) is not None and c <= nfe), None)


# ---------------------------------------------------------------------------------------------- ours


def our_grids() -> dict[str, Callable[..., Tensor]]:
    """The public functions (sde, n, *, t_end, ...) of `samplers.grids`, each once."""
    found: dict[str, Callable[..., Tensor]] = {}
    for name, f in vars(grids).items():
        if name.startswith("_") or not inspect.isfunction(f) or f in found.values():
            continue
        p = inspect.signature(f).parameters
        required = [k for k, v in p.items() if v.default is v.empty]
        if required == ["sde", "n"] and "t_end" in p:
            found[name] = f
    return found


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """ "angle:order=4:corrected=False" as (name, knobs)."""
    name, *knobs = spec.split(":")
    out = {}
    for knob in knobs:
        key, sep, value = knob.partition("=")
        if not sep:
            raise ValueError(f"a knob is written name=value, got {knob!r} in {spec!r}")
        try:
            out[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            out[key] = value
    return name, out


def told(f: Callable[..., Any], knobs: dict[str, Any], case: Case) -> dict[str, Any]:
    """The knobs, and the data's standard deviation if f takes it (as `d` or `sigma_data`) and they do not say it."""
    takes = inspect.signature(f).parameters
    return {k: case.sigma_data for k in ("d", "sigma_data") if k in takes} | knobs


def ours(spec: str, grid_specs: Sequence[str]) -> list[Method]:
    """One of `samplers.SAMPLERS` on each grid, both with knobs.  They are told sigma_data if they take it."""
    if spec in FITTED:
        return [fitted(spec)]
    name, knobs = parse(spec)
    if name not in samplers.SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; choose from {', '.join(samplers.SAMPLERS)}")
    sampler, known = samplers.SAMPLERS[name], our_grids()
    _check_knobs(sampler, name, knobs)

    def on(grid_spec: str) -> Method:
        grid, more = parse(grid_spec)
        if grid not in known:
            raise ValueError(f"unknown grid {grid!r}; choose from {', '.join(known)}")
        _check_knobs(known[grid], grid, more)

        def run(case: Case, score: Score, x: Tensor, steps: int) -> Tensor:
            ts = known[grid](case.sde, steps, t_end=case.t_end, **told(known[grid], more, case))
            return sampler(score, case.sde, x, ts, noise=_no_noise, **told(sampler, knobs, case))

        return Method("scoresde", spec, grid_spec, run)

    return [on(g) for g in grid_specs]


FITTED = ("searched", "calibrated")


def fitted(name: str) -> Method:
    """`auto` with what was fitted on 64 or 512 other starts: a grid, searched up to 20 steps; a solver, up to 10."""
    made: dict[tuple[str, int], samplers.FittedGrid | samplers.Calibration] = {}

    def run(case: Case, score: Score, x: Tensor, steps: int) -> Tensor:
        if case.name not in NAMES:
            raise ValueError(f"{name} is for the exact problems, not for {case.name!r}; see experiments.fit")
        key = (case.name, steps)
        if key not in made:
            s, sde, d, end = case.score, case.sde, case.sigma_data, case.t_end
            if name == "searched":
                fresh = problem(case.name).start(64, 7001)
                grid = samplers.fit_grid(s, sde, fresh, d=d, t_end=end)
                made[key] = grid.search(s, sde, fresh, steps, progress=False) if steps <= 20 else grid
            else:
                fresh = problem(case.name).start(512, 7002)
                made[key] = samplers.calibrate(s, sde, fresh, steps, d=d, t_end=end, progress=False)
        return samplers.auto(score, case.sde, x, steps, fitted=made[key])

    return Method("scoresde", name, "its own", run)


def _check_knobs(f: Callable[..., Any], name: str, knobs: dict[str, Any]) -> None:
    takes = [k for k, v in inspect.signature(f).parameters.items() if v.kind is v.KEYWORD_ONLY]
    if unknown := [k for k in knobs if k not in takes]:
        raise ValueError(f"{name} has no knob {unknown[0]!r}; its knobs are {', '.join(takes) or 'none'}")


class Stochastic(Exception):
    """Raised by a sampler that draws noise: its endpoint is not the flow's."""


def _no_noise(_: Tensor) -> Tensor:
    raise Stochastic


def deterministic(case: Case) -> list[str]:
    """The samplers that follow the flow on a fixed grid: no noise drawn, calls set by the grid alone."""
    names = []
    for name in samplers.SAMPLERS:
        if name == "ode":  # its steps are its own
            continue
        try:
            _dry(case, ours(name, ["uniform"])[0], 4)
        except Stochastic:
            continue
        names.append(name)
    return names


def _dry(case: Case, method: Method, steps: int) -> int | None:
    """Calls counted on two samples of Gaussian data of the case's shape; None if the method refuses these steps."""
    sd2 = case.sigma_data**2

    def gaussian(x: Tensor, t: Tensor) -> Tensor:
        return -x / (case.sde.alpha(t) ** 2 * sd2 + case.sde.sigma(t) ** 2).to(x)

    score = counted(gaussian)
    try:
        method.run(case, score, case.x[:2], steps)
    except (ArithmeticError, ValueError):
        return None
    return score.calls


# ---------------------------------------------------------------------------------------------- peers


def theirs(case: Case, libraries: tuple[str, ...]) -> list[Method]:
    """Every sampler of the libraries on every grid of all of them."""
    ends = torch.tensor([case.sde.T, case.t_end], dtype=torch.float64)
    r0, r1 = (float(v) for v in torch.exp(-case.sde.lam(ends)))
    alpha, alpha1 = (float(v) for v in case.sde.alpha(ends))
    known = others.grids(r0, r1)

    def on(peer: others.Peer, grid: str) -> Method:
        def run(case: Case, score: Score, x: Tensor, steps: int) -> Tensor:
            return peer.run(others.eps_of(score, case.sde), x / alpha, known[grid](steps)) * alpha1

        return Method(peer.library, peer.name, grid, run)

    found = []
    for peer in others.peers(libraries):
        for grid in filter(peer.takes, known):
            method = on(peer, grid)
            found.append(replace(method, grid="its own") if peer.own_grid else method)
    return found


def versions(libraries: Iterable[str]) -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name.replace('_', '-'))}" for name in libraries)


# ---------------------------------------------------------------------------------------------- runs


def measure(case: Case, runs: Sequence[tuple[Method, int]]) -> list[Row]:
    """Each method within its budget of calls, by the error of its endpoints; left out where not even a step fits."""
    rows, dry, done = [], {}, {}
    for method, nfe in tqdm(runs, desc=case.name, unit="run", leave=False, mininterval=1):

        def calls(n: int, method: Method = method) -> int | None:
            if method.name in FITTED:  # a dry run on another score would be refused, rightly
                return n if method.name == "searched" or n <= 10 else None
            key = (method.library, method.name, method.grid if method.library == "scoresde" else "any", n)
            if key not in dry:
                dry[key] = _dry(case, method, n)
            return dry[key]

        steps = fitting(calls, nfe)
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


def exact_case(p: Problem, n: int, seed: int, folder: Path) -> Case:
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


def digest(case: Case) -> str:
    """What a peer's rows depend on besides its version: starts, ends (to five digits), and the code that runs it."""
    key = hashlib.sha256(Path(others.__file__).read_bytes())
    key.update(case.x.contiguous().numpy().tobytes())
    key.update(f"{case.sde} {case.t_end} {float(case.exact.square().mean()):.5g}".encode())
    return f"{len(case.x)} samples, {key.hexdigest()[:16]}"


def kept(file: Path, key: str, make: Callable[[], list[Row]]) -> list[Row]:
    """Rows of an earlier run with the same key, or made now and kept."""
    if file.exists():
        old = json.loads(file.read_text())
        if old["key"] == key:
            return [Row(**row) for row in old["rows"]]
    rows = make()
    with whole(file) as temporary:
        temporary.write_text(json.dumps({"key": key, "rows": [asdict(r) for r in rows]}))
    return rows


# ---------------------------------------------------------------------------------------------- tables


def cell(row: Row | None, width: int = 18) -> str:
    if row is None or row.rms95 == 0:
        return f"{'-':<{width}}"
    return f"{math.log10(row.rms95):6.2f} {row.grid}"[:width].ljust(width)


def table(rows: Sequence[Row], budgets: Sequence[int], name: str) -> None:
    """log10 rms95 and the grid it was reached on: each of ours, each library's best, the best of all peers."""
    print(f"\n{name}: log10 rms95, best grid\n{'calls':<26}" + "".join(f"{n:<19}" for n in budgets))

    def line(label: str, chosen: Sequence[Row]) -> None:
        print(f"{label:<26}" + " ".join(cell(best(r for r in chosen if r.nfe == n)) for n in budgets))

    for sampler in dict.fromkeys(r.sampler for r in rows if r.library == "scoresde"):
        line(sampler, [r for r in rows if r.library == "scoresde" and r.sampler == sampler])
    peers = [r for r in rows if r.library != "scoresde"]
    for library in dict.fromkeys(r.library for r in peers):
        line(f"best of {library}", [r for r in peers if r.library == library])
    shipped = [r for r in peers if others.shipped(r.library, r.grid)]
    for label, chosen in (("best peer", peers), ("best on shipped grids", shipped)) if peers else ():
        line(label, chosen)
        winners = [best(r for r in chosen if r.nfe == n) for n in budgets]
        print(" " * 26 + " ".join(f"{'' if w is None else w.sampler:>18}"[:18] for w in winners))


def write_csv(rows: Sequence[Row], file: Path) -> None:
    with whole(file) as temporary, open(temporary, "w", newline="") as f:
        writer = csv.DictWriter(f, list(Row.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(r) for r in rows)


def draw(rows: Sequence[Row], budgets: Sequence[int], file: Path) -> None:
    """Error against calls, a panel a problem: ours in colour, peers thin and grey, the best of them black."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r.problem for r in rows))
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(5 * columns, 4 * lines), layout="constrained")
    for k, name in enumerate(names):
        ax = figure.add_subplot(lines, columns, k + 1, title=name, xlabel="network calls", ylabel="rms95")
        ax.set_xscale("log")
        ax.set_yscale("log")
        here = [r for r in rows if r.problem == name]

        def curve(chosen: Sequence[Row], ax: Any = ax, **style: Any) -> None:
            found = [b for n in budgets if (b := best(r for r in chosen if r.nfe == n)) is not None]
            ax.plot([b.nfe for b in found], [b.rms95 for b in found], **style)

        peers = [r for r in here if r.library != "scoresde"]
        for which in dict.fromkeys((r.library, r.sampler) for r in peers):
            curve([r for r in peers if (r.library, r.sampler) == which], color="0.8", linewidth=0.6)
        if peers:
            curve(peers, color="black", linewidth=1.2, linestyle="--", label="best of all peers")
        mine = [r for r in here if r.library == "scoresde"]
        for sampler in dict.fromkeys(r.sampler for r in mine):
            curve([r for r in mine if r.sampler == sampler], linewidth=2, marker="o", markersize=3, label=sampler)
        ax.set_xticks(list(budgets), [str(n) for n in budgets])
        ax.minorticks_off()
        ax.legend(fontsize=6)
    with whole(file) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def calls_needed(curve: Sequence[tuple[int, float]], error: float) -> float:
    """Calls where a curve of (calls, error) first reaches `error`, linear in log error over log calls; inf if never."""
    for (n, e), (n1, e1) in pairwise(curve):
        if e <= error:
            return n
        if e1 <= error:
            w = (math.log(e) - math.log(error)) / (math.log(e) - math.log(e1))
            return math.exp(math.log(n) + w * (math.log(n1) - math.log(n)))
    return curve[-1][0] if curve and curve[-1][1] <= error else math.inf


def claims_against_peers(rows: Sequence[Row], name: str, grid: str | None) -> list[Claim]:
    """`name` (on `grid`, or its best) against the best of all peers, on the problems of the table."""
    claims = []
    for where in TABLE:
        here = [r for r in rows if r.problem == where]
        mine = [r for r in here if r.library == "scoresde" and r.sampler == name and grid in (None, r.grid)]
        peers = [r for r in here if r.library != "scoresde"]
        if not mine or not peers:
            continue
        curve = [(n, b.rms95) for n in sorted({r.nfe for r in mine}) if (b := best(r for r in mine if r.nfe == n))]
        for n, e in curve:
            rival = best(r for r in peers if r.nfe == n)
            if rival is not None and n in CLAIMED:
                claims.append(
                    Claim(f"{where}, {n} calls: error over that of {rival.sampler}", e / rival.rms95, "<=", 0.5)
                )
            if rival is not None and n >= 20:
                share = calls_needed(curve, rival.rms95) / n
                claims.append(Claim(f"{where}: share of {n} calls for the best peer's error", share, "<=", 0.5))
    return claims


def claims_on_auto(rows: Sequence[Row], name: str, grid: str | None) -> list[Claim]:
    """`name` on the six problems of `auto`: its worst ratio to the best of all peers, and how often it is best."""
    ratios: dict[str, list[float]] = {}
    for where in AUTO:
        here = [r for r in rows if r.problem == where]
        for n in sorted({r.nfe for r in here}):
            at = [r for r in here if r.nfe == n]
            mine = best(r for r in at if r.library == "scoresde" and r.sampler == name and grid in (None, r.grid))
            rival = best(r for r in at if r.library != "scoresde")
            if mine and rival:
                ratios.setdefault(where, []).append(mine.rms95 / rival.rms95)
    claims = [Claim(f"{where}: worst error over the best peer's", max(v), "<=", 1.05) for where, v in ratios.items()]
    every = [v for values in ratios.values() for v in values]
    if every:
        claims.append(Claim("share where strictly best", sum(v < 1 for v in every) / len(every), ">=", 2 / 3))
    return claims


def law(case: Problem, methods: Sequence[Method], rows: Sequence[Row], n: int, seed: int) -> None:
    """Sliced W2 to fresh exact samples, of each sampler on its best grid."""
    x, fresh = case.start(n, seed + 77), case.data_units(case.draw(n, seed + 78, case.t_end))
    whole_case = Case(case.name, case.sde, case.score, case.t_end, case.sigma_data, x, x)
    print(f"\n{case.name}: sliced W2 of {n} samples; exact against exact {case.floor(n, seed):.4g}")
    for r in rows:
        b = best(q for q in rows if (q.library, q.sampler, q.nfe) == (r.library, r.sampler, r.nfe))
        if r is not b:
            continue
        method = next(m for m in methods if (m.library, m.name, m.grid) == (r.library, r.sampler, r.grid))
        steps = fitting(lambda k, method=method: _dry(whole_case, method, k), r.nfe)  # type: ignore[misc]
        x1 = method.run(whole_case, case.score, x, steps or 1)
        print(f"{r.sampler:<26} {r.nfe:>4} calls, {r.grid:<16} {sliced_w2(case.data_units(x1), fresh, seed=seed):.4g}")


def numbers(text: str) -> tuple[int, ...]:
    """ "5,8,10" as numbers of calls."""
    values = tuple(int(v) for v in text.split(","))
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"calls must be at least 1, got {text!r}")
    return tuple(sorted(set(values)))


def main(argv: list[str] | None = None) -> list[Claim]:
    p = parser(__doc__, "work_precision")
    p.add_argument("--problems", default=",".join(TABLE), metavar="A,B", help=f"of {', '.join(NAMES)}; (%(default)s)")
    p.add_argument(
        "--samplers", metavar="A,B", help="of samplers.SAMPLERS, name[:knob=value]; default: all on the flow"
    )
    p.add_argument("--grids", metavar="A,B", help="of samplers.grids, name[:knob=value] (default: all)")
    p.add_argument("--nfe", type=numbers, default=NFE, metavar="N,N", help="network calls (5,8,10,15,20,35,50)")
    p.add_argument("--n", type=int, default=256, help="samples (%(default)s)")
    p.add_argument(
        "--peers", nargs="?", const=",".join(others.LIBRARIES), metavar="LIBS",
        help="also other libraries' samplers; all that are installed, or the ones named",
    )  # fmt: skip
    p.add_argument("--ours", default="angle", metavar="NAME", help="whose claims these are (%(default)s)")
    p.add_argument("--grid", help="the grid it claims them on (default: its best)")
    p.add_argument("--law", type=int, default=0, metavar="N", help="sliced W2 of N samples, for ours")
    p.add_argument("--model", type=Path, metavar="FILE", help="a trained network instead of the exact problems")
    args = p.parse_args(argv)
    start(args)
    n = 32 if args.quick else args.n
    budgets = args.nfe[:3] if args.quick else args.nfe
    chosen = list(our_grids()) if args.grids is None else args.grids.split(",")
    rows: list[Row] = []
    try:
        libraries = () if args.peers is None else tuple(args.peers.split(","))
        if args.peers == ",".join(others.LIBRARIES):
            libraries = tuple(name for name in libraries if others.installed(name))
        others.peers(libraries)
        names = ["model"] if args.model else args.problems.split(",")
        asked = None if args.samplers is None else args.samplers.split(",")
        for spec in asked or ["ddim"]:
            ours(spec, chosen)  # checked before any work
        for name in () if args.model else names:
            problem(name)
        if args.quick:
            names = names[:1]
        for name in names:
            case = (
                model_case(args.model, n, args.seed)
                if args.model
                else exact_case(problem(name), n, args.seed, args.out / "flow")
            )
            methods = [m for spec in asked or deterministic(case) for m in ours(spec, chosen)]
            here = measure(case, every(methods, budgets))
            if args.law and not args.model:
                law(problem(name), methods, here, args.law, args.seed)
            if libraries:
                key = f"{versions(libraries)}; {digest(case)}, calls {budgets}"

                def run(case: Case = case) -> list[Row]:
                    return screened(case, theirs(case, libraries), budgets)

                here += kept(args.out / f"peers-{name}.json", key, run)
            table(here, budgets, name)
            rows += here
    except (ValueError, ImportError, OSError) as err:
        p.error(str(err))
    write_csv(rows, args.out / "work_precision.csv")
    draw(rows, budgets, args.out / "work_precision.png")
    print(f"\n{args.out / 'work_precision.csv'}, {args.out / 'work_precision.png'}")
    claims = claims_against_peers(rows, args.ours, args.grid) + claims_on_auto(rows, args.ours, args.grid)
    report(claims, args.json)
    return claims


if __name__ == "__main__":
    main()
