"""Tolerances kept: the worst sample of adaptive solvers of the flow, and what it costs beside torchdiffeq's.

    python -m experiments.tolerances                      nine mixtures, 256 samples, 1e-3 to 1e-7
    python -m experiments.tolerances --problems 2d,digits

    worst  max over samples of sqrt(mean over coordinates of (x - exact)^2) / tol at t_end, rtol = atol = tol;
           exact by Dormand and Prince's pair of order 8 at 1e-12
    calls  of the score for the whole batch, and rows: samples over all calls; both over those of
           torchdiffeq's dopri5 as it comes (one step for all, the norm a mean over the batch), whose rows never leave
    moves  the furthest that any of 4 samples is in the batch of them from where it is alone, in tolerances; the
           score is asked row by row here, since matrix products round differently with the size of a batch

Solvers: `samplers.ode` with all that have own steps for each sample; torchdiffeq's dopri5 as it comes, and with
the norm of the worst sample ("dopri5").  torchdiffeq's integrate z = x/R over u = log(sigma/alpha).
Claims, for "each" on every problem, at every tolerance: worst at most 3, calls at most 1.25 times torchdiffeq's,
moves 0: the same bits.
To expect (15 minutes): all hold.  "each" ends within 1.7 tolerances (64d-small at 1e-3; elsewhere 0.34), at 0.67 to
1.09 times the calls and 0.56 to 0.86 times the rows; pairs within 11 (dopri5), 13 (tsit5), 14 (dop853), 73 (bosh3), at
up to 1.7, 1.7, 3.2, 7.1 times the calls.  torchdiffeq's dopri5 ends 30 to 4300 tolerances off as it comes, 2.6 to 275
with the norm of the worst sample (at most 1.5 times the calls); a batch moves its samples by up to 300 and 680.
Writes OUT/tolerances.csv and .png.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torchdiffeq
from torch import Tensor
from tqdm.auto import tqdm

from experiments.common import Claim, parser, report, start, write_csv
from experiments.problems import NAMES, problem
from samplers import ode
from scoresde import counted, flow, rowwise
from scoresde.files import whole
from scoresde.flow import EACH, OWN_STEPS, radius
from scoresde.types import SDE, Score

TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
ALONE = 4
THEIRS = "as it comes"

Solver = Callable[[Score, SDE, Tensor, Tensor, float], Tensor]  # (score, sde, x at ts[0], ts of two, tol) -> x at ts[1]


def as_it_comes(score: Score, sde: SDE, x: Tensor, ts: Tensor, tol: float) -> Tensor:
    """torchdiffeq's dopri5 with its own norm: z = x/R over u = log(sigma/alpha), to the end and not over it."""

    def rhs(u: Tensor, z: Tensor) -> Tensor:
        t = sde.time(-u)
        R = radius(sde, t)
        return -(sde.sigma(t) ** 2) / R * (score(z * R, t) + z / R)

    (R, R1), u = radius(sde, ts), -sde.lam(ts)
    z = torchdiffeq.odeint(rhs, x / R, u, method="dopri5", rtol=tol, atol=tol, options={"step_t": u[1:]})
    return z[-1] * R1


def by_ode(method: str, score: Score, sde: SDE, x: Tensor, ts: Tensor, tol: float) -> Tensor:
    return ode(score, sde, x, ts, method=method, rtol=tol, atol=tol)


SOLVERS: dict[str, Solver] = {name: partial(by_ode, name) for name in (*OWN_STEPS, "dopri5")} | {THEIRS: as_it_comes}


@dataclass(frozen=True)
class Row:
    """One run; worst and moves in tolerances, calls of the score and rows over all of them."""

    problem: str
    solver: str
    tol: float
    worst: float
    calls: int
    rows: int
    moves: float


def worst(x: Tensor, exact: Tensor) -> float:
    """The largest over samples of the RMS over coordinates of x - exact; infinite where one is not finite."""
    return float((x - exact).flatten(1).square().mean(1).sqrt().nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def row_by_row(score: Score) -> Score:
    """The same score, asked for one sample at a time: the same bits in any batch."""

    def one_at_a_time(x: Tensor, t: Tensor) -> Tensor:
        times = t.expand(len(x))
        return torch.cat([score(x[i : i + 1], times[i : i + 1]) for i in range(len(x))])

    return rowwise(one_at_a_time)


def measure(name: str, solvers: Sequence[str], n: int, seed: int) -> list[Row]:
    """All runs on one problem, from the same n starts."""
    p = problem(name)
    x, ts = p.start(n, seed), torch.tensor([p.sde.T, p.t_end], dtype=torch.float64)
    exact = flow(p.score, p.sde, x, ts[0], ts[1], method="each:dop853", rtol=1e-12, atol=1e-12)
    apart, some, rows = row_by_row(p.score), x[:ALONE], []
    for tol in tqdm(TOLERANCES, desc=name, unit="tolerance", leave=False):
        for solver in solvers:
            run, score = SOLVERS[solver], counted(p.score)
            off = worst(run(score, p.sde, x, ts, tol), exact)
            together = run(apart, p.sde, some, ts, tol)
            alone = torch.cat([run(apart, p.sde, v, ts, tol) for v in some.split(1)])
            rows.append(Row(name, solver, tol, off / tol, score.calls, score.samples, worst(together, alone) / tol))
    return rows


def against(rows: Sequence[Row], r: Row) -> Row:
    """torchdiffeq's run beside this one."""
    return next(q for q in rows if (q.problem, q.solver, q.tol) == (r.problem, THEIRS, r.tol))


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Of "each": the worst over tolerances, on each problem."""
    made = []
    for name in dict.fromkeys(r.problem for r in rows):
        here = [r for r in rows if (r.problem, r.solver) == (name, EACH)]
        calls = max(r.calls / against(rows, r).calls for r in here)
        made += [
            Claim(f"{name}: worst sample, in tolerances", max(r.worst for r in here), "<=", 3.0),
            Claim(f"{name}: calls over torchdiffeq's", calls, "<=", 1.25),
            Claim(f"{name}: what a batch changes, in tolerances", max(r.moves for r in here), "<=", 0.0),
        ]
    return made


def show(rows: Sequence[Row]) -> None:
    """A block a problem, a line a solver, a column a tolerance; then the worst of all problems."""
    solvers = list(dict.fromkeys(r.solver for r in rows))
    width, part = max(map(len, solvers)), 9 * len(TOLERANCES)
    head = "".join(f"{tol:>9.0e}" for tol in TOLERANCES)
    names = list(dict.fromkeys(r.problem for r in rows))
    for name in names if len(names) == 1 else (*names, "all"):
        heads = (f"{what:^{part}}" for what in ("worst, in tolerances", "calls over theirs", "rows over theirs"))
        print(f"\n{name:{width}} {' '.join(heads)}".rstrip())
        print(f"{'':{width}} {head} {head} {head}  moves")
        for solver in solvers:
            here = [r for r in rows if r.solver == solver and name in (r.problem, "all")]
            at = [[r for r in here if r.tol == tol] for tol in TOLERANCES]
            errors = "".join(f"{max(r.worst for r in some):9.3g}" for some in at)
            calls = "".join(f"{max(r.calls / against(rows, r).calls for r in some):9.2f}" for some in at)
            asked = "".join(f"{max(r.rows / against(rows, r).rows for r in some):9.2f}" for some in at)
            print(f"{solver:{width}} {errors} {calls} {asked}  {max(r.moves for r in here):.2g}")


def draw(rows: Sequence[Row], file: Path) -> None:
    """Worst sample and calls against the tolerance: a line a solver for the worst problem, a dot a problem."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    panels: dict[str, Callable[[Row], float]] = {
        "worst sample, in tolerances": lambda r: r.worst,
        "calls over those of torchdiffeq's dopri5": lambda r: r.calls / against(rows, r).calls,
    }
    for k, (label, of) in enumerate(panels.items()):
        ax = figure.add_subplot(1, 2, k + 1, xlabel="rtol = atol", ylabel=label)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.axhline((3.0, 1.25)[k], color="black", linewidth=1, linestyle="--")
        for j, solver in enumerate(dict.fromkeys(r.solver for r in rows)):
            here = [r for r in rows if r.solver == solver]
            most = [max(of(r) for r in here if r.tol == tol) for tol in TOLERANCES]
            ax.plot(TOLERANCES, most, color=f"C{j}", linewidth=3 if solver == EACH else 1, label=solver)
            ax.plot([r.tol for r in here], [of(r) for r in here], ".", color=f"C{j}", markersize=3)
        ax.legend(fontsize=7)
    with whole(file) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def main(argv: list[str] | None = None) -> list[Claim]:
    p = parser(__doc__, "tolerances")
    p.add_argument("--problems", type=known, default=NAMES, metavar="A,B", help=f"of {', '.join(NAMES)} (all)")
    args = p.parse_args(argv)
    if start(args).type != "cpu":
        p.error("tolerances are checked in float64 on the CPU; leave --device out")
    solvers = (EACH, f"{EACH}:dopri5", THEIRS) if args.quick else tuple(SOLVERS)
    names, n = (args.problems[:1], 16) if args.quick else (args.problems, 256)
    rows = [r for name in tqdm(names, unit="problem") for r in measure(name, solvers, n, args.seed)]
    show(rows)
    write_csv([asdict(r) for r in rows], args.out / "tolerances.csv")
    draw(rows, args.out / "tolerances.png")
    print(f"\n{args.out / 'tolerances.csv'}, {args.out / 'tolerances.png'}")
    made = claims(rows)
    report(made, args.json)
    return made


def known(text: str) -> tuple[str, ...]:
    """ "2d,digits" as names of problems."""
    names = tuple(text.split(","))
    if unknown := set(names) - set(NAMES):
        raise argparse.ArgumentTypeError(
            f"unknown problem {', '.join(sorted(unknown))}; choose from {', '.join(NAMES)}"
        )
    return names


if __name__ == "__main__":
    main()
