"""Parallel in time: rounds, the sequential depth, that 500 steps of a one-step sampler take to 1e-3.

    python -m experiments.parallel_rounds [--steps 500] [--problems 2d,digits]

The nine mixtures of `experiments.problems`, the flow (DDIM) and the SDE with frozen noise (eta = 1), 16 samples
each, against the sequential sampler on the same grid and noise, by three sources of the score's slope:

    gaussian    data of standard deviation d: Picard's iteration in the exponential form
    secants     and the slopes seen in the last three rounds (the default)
    jacobian    the whole Jacobian in each of 32 stretches of the grid, by differences within the round

rounds: until the worst sample is, and stays, within 1e-3 RMS of the sequential result, in units of
sqrt(alpha^2 d^2 + sigma^2); stop: when the sampler itself knows, by no state's moving by 1e-3 in a round;
rows: network evaluations a sample, in units of the steps (finished samples leave).  No derivative is taken.

Claims: with `jacobian`, at most 14 rounds, and stopped by round 14, on every problem, flow and SDE.
To expect: all hold: flow 5 to 10 rounds, stop at 6 to 11; SDE 6 to 13, stop at 7 to 14; rows 4.5 to 43, for pictures
(D = 256) 95 and 112.  Secants, SDE: 8 to 24, stop at 9 to 25.  15 minutes, ten of them pictures with `jacobian`.
Other samples: with seed 1, without pictures, one of 256 runs takes more than 14, namely 18 (64d, SDE; were the Jacobian
that of every step, 16; secants 22): its end creeps along a separatrix, round by round.
Writes OUT/parallel_rounds.csv and .png (worst error against rounds).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from experiments.common import Claim, parser, report, start, write_csv
from experiments.problems import NAMES, Problem, problem
from samplers import ddim, grids, kernels, parallel
from scoresde import Streams, counted
from scoresde.adaptive import rowwise
from scoresde.files import whole

TOL = 1e-3
ETAS = {"flow": 0.0, "SDE": 1.0}
SLOPES = {"gaussian": {"memory": 0}, "secants": {}, "jacobian": {"stretches": 32}}


@dataclass(frozen=True)
class Row:
    """One run: the claim's figures, and the worst sample's error after each round."""

    problem: str
    process: str
    slope: str
    rounds: int
    stop: int
    rows: float
    errors: list[float] = field(repr=False)


def rounds_to(errors: Sequence[float], tol: float) -> int:
    """The first round from which all errors are within tol; one more than there are if the last is not."""
    late = [k for k, e in enumerate(errors, 1) if not e <= tol]
    return late[-1] + 1 if late else 1


def measure(p: Problem, process: str, slope: str, steps: int, samples: int, seed: int) -> Row:
    ts, x = grids.log_snr(p.sde, steps, t_end=p.t_end), p.start(samples, seed)
    eta = ETAS[process]
    want = ddim(p.score, p.sde, x, ts, eta=eta, noise=Streams(seed + 3, samples))
    unit = float(torch.sqrt((p.sde.alpha(ts[-1]) * p.sigma_data) ** 2 + p.sde.sigma(ts[-1]) ** 2))
    errors: list[float] = []

    def on_round(k: int, y: Tensor, change: Tensor) -> None:
        errors.append(float((y - want).flatten(1).square().mean(1).sqrt().max()) / unit)

    calls = counted(p.score)
    parallel(
        rowwise(calls),
        p.sde,
        x,
        ts,
        kernel=partial(kernels.ddim, eta=eta),
        noise=Streams(seed + 3, samples),
        sigma_data=p.sigma_data,
        tol=TOL,
        on_round=on_round,
        **SLOPES[slope],  # type: ignore[arg-type]
    )
    rows = calls.samples / (samples * steps)
    return Row(p.name, process, slope, rounds_to(errors, TOL), calls.calls, rows, errors)


def claims(rows: Sequence[Row]) -> list[Claim]:
    made = []
    for r in rows:
        if r.slope == "jacobian":
            made.append(Claim(f"{r.problem}, {r.process}: rounds to 1e-3", r.rounds, "<=", 14))
            made.append(Claim(f"{r.problem}, {r.process}: rounds until it stops", r.stop, "<=", 14))
    return made


def show(rows: Sequence[Row]) -> None:
    """A line a problem and process; rounds, stop and rows of each slope."""
    slopes = list(dict.fromkeys(r.slope for r in rows))
    print(f"{'':16}" + "".join(f"{s:^24}" for s in slopes))
    print(f"{'':16}" + f"{'rounds':>8}{'stop':>6}{'rows':>7}   " * len(slopes))
    by = {(r.problem, r.process, r.slope): r for r in rows}
    for name, process in dict.fromkeys((r.problem, r.process) for r in rows):
        cells = "".join(f"{r.rounds:8}{r.stop:6}{r.rows:7.1f}   " for r in (by[name, process, s] for s in slopes))
        print(f"{name:10} {process:5}{cells}".rstrip())


def draw(rows: Sequence[Row], file: Path) -> None:
    """Worst error against rounds: a panel for flow and SDE, a colour a problem, a dash a slope."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    names = list(dict.fromkeys(r.problem for r in rows))
    dashes = dict(zip(SLOPES, (":", "--", "-"), strict=True))
    for k, process in enumerate(ETAS):
        ax = figure.add_subplot(
            1, len(ETAS), k + 1, title=f"{process}: gaussian dotted, secants dashed, jacobian solid"
        )
        ax.set(xlabel="rounds", ylabel="worst sample's error", yscale="log")
        ax.axhline(TOL, color="0.7", linewidth=1)
        for r in rows:
            if r.process == process:
                label = r.problem if r.slope == "jacobian" else None
                colour = f"C{names.index(r.problem)}"
                ax.plot(range(1, len(r.errors) + 1), r.errors, dashes[r.slope], color=colour, linewidth=1, label=label)
    ax.legend(fontsize=7)
    with whole(file) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def main(argv: list[str] | None = None) -> list[Claim]:
    p = parser(__doc__, "parallel_rounds")
    p.add_argument("--steps", type=int, default=500, metavar="N", help="sequential steps (%(default)s)")
    p.add_argument("--problems", default=",".join(NAMES), metavar="A,B", help="only these (default: all)")
    args = p.parse_args(argv)
    if args.steps < 1:
        p.error(f"--steps must be at least 1, got {args.steps}")
    names = args.problems.split(",")
    if unknown := set(names) - set(NAMES):
        p.error(f"unknown problem {', '.join(sorted(unknown))}; choose from {', '.join(NAMES)}")
    if start(args).type != "cpu":
        p.error("the mixtures are float64 on the CPU; leave --device out")
    steps, samples = (min(args.steps, 60), 2) if args.quick else (args.steps, 16)
    if args.quick:
        names = [n for n in names if n in ("2d", "16d")] or names[:1]
    runs = [(n, e, s) for n in names for e in ETAS for s in SLOPES]
    rows = [measure(problem(n), e, s, steps, samples, args.seed) for n, e, s in tqdm(runs, unit="run")]
    show(rows)
    write_csv([{k: v for k, v in asdict(r).items() if k != "errors"} for r in rows], args.out / "parallel_rounds.csv")
    draw(rows, args.out / "parallel_rounds.png")
    print(f"table and picture: {args.out / 'parallel_rounds.csv'}, {args.out / 'parallel_rounds.png'}")
    made = claims(rows)
    report(made, args.json)
    return made


if __name__ == "__main__":
    main()
