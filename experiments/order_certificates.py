"""Order certificates: the order every public sampler is documented to have, against the one it is seen to have.

    python -m experiments.order_certificates                       every sampler and its documented variants
    python -m experiments.order_certificates --samplers angle,ddim

Gaussian: for N(m, v) data every sampler is affine in the state and its noise, x1 = A x + b + sum_i C_i z_i, so
one run in which row 2 + i sees draw i alone gives A, b and all C_i: mean and variance at the end are exact, and
the weak order is seen without Monte Carlo.  (Directions of a covariance separate: three variances stand for any.)
Mixture: for samplers that draw no noise, the endpoints of a 2-D mixture of 8 against the exact flow at 1e-12.
Path: for samplers that draw once a step, the same mixture and the same Brownian path on N, 2N and 4N steps,

    p = log2(E|x_N - x_2N| / E|x_2N - x_4N|),   dB = sqrt(c1 - c) z,   c = (alpha/sigma)^2,

where what a step does not know of the path makes the strong order 1, whatever the weak order (mean over 512).

Observed is p = log2(error with N steps / error with 2N), N given in the table: large enough for the leading term
to lead, small enough for rounding (1e-14) not to.  The steps shrink from sigma/alpha = 1.5 to 0.5, where a rising
start weighs most; "level" grids have equal steps in sigma/alpha.
Claims: |observed - documented| <= 0.15 for every sampler, its variant furthest off, in VP, sub-VP and VE; the same
for the strong order 1 of all that have one.
To expect: all hold, most within 0.05, in 100 s.  Writes OUT/order_certificates.csv and .png (error against steps).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

import samplers
from experiments.common import Claim, parser, report, start, write_csv
from experiments.problems import Problem, problem
from experiments.variants import Variant, variants
from scoresde import VE, VP, Streams, SubVP, counted, flow
from scoresde.files import whole
from scoresde.types import SDE, Noise, Score

PROCESSES: dict[str, SDE] = {"VP": VP(), "sub-VP": SubVP(), "VE": VE()}
ENDS = (1.5, 0.5)  # sigma/alpha
MEAN = torch.tensor([[0.7, -1.0, 0.3]], dtype=torch.float64)
VAR = torch.tensor([0.05, 0.5, 2.0], dtype=torch.float64)
SAMPLES = 512


def grid(sde: SDE, n: int, level: bool = False) -> Tensor:
    """n steps from sigma/alpha = 1.5 to 0.5: shrinking smoothly in t, or equal in sigma/alpha."""
    first, last = ENDS
    u = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    if level:
        return sde.time(-torch.log(first + u * (last - first)))
    t, t1 = sde.time(-torch.log(torch.tensor(ENDS, dtype=torch.float64)))
    return t + (1.4 * u - 0.4 * u * u) * (t1 - t)


def law(sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of x_t."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    return alpha * MEAN, alpha**2 * VAR + sigma**2


def gaussian_score(sde: SDE) -> Score:
    def score(x: Tensor, t: Tensor) -> Tensor:
        mean, var = law(sde, t)
        return (mean - x) / var

    return score


class Impulses:
    """A noise whose i-th draw is 1 in row 2 + i, where there is one, and 0 elsewhere; `drawn` counts."""

    def __init__(self) -> None:
        self.drawn = 0

    def __call__(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        z[2 + self.drawn : 3 + self.drawn] = 1
        self.drawn += 1
        return z


def moments(run: Callable[..., Tensor], sde: SDE, ts: Tensor) -> tuple[Tensor, Tensor, int]:
    """Exact mean and variance at ts[-1], and the number of draws."""
    mean, var = law(sde, ts[0])
    dry = Impulses()
    run(gaussian_score(sde), sde, mean, ts, noise=dry)
    x = mean.repeat(2 + dry.drawn, 1)
    x[1] += 1
    out = run(gaussian_score(sde), sde, x, ts, noise=Impulses())
    answer = out[1:] - out[0]
    return out[0], answer[0] ** 2 * var + answer[1:].square().sum(0), dry.drawn


def gaussian_error(run: Callable[..., Tensor], sde: SDE, ts: Tensor) -> tuple[float, int]:
    """Distance of mean and variance at the end from the truth, in standard deviations; draws."""
    mean, var, drawn = moments(run, sde, ts)
    mean1, var1 = law(sde, ts[-1])
    return float(((mean - mean1) ** 2 / var1 + (var / var1 - 1) ** 2).sum().sqrt()), drawn


def mixture() -> Problem:
    return problem("2d")


@cache
def paths(process: str, n: int) -> tuple[Score, Tensor, Tensor]:
    """The mixture's score, n draws at sigma/alpha = 1.5, and where the exact flow takes the first 16 of them."""
    sde, target = PROCESSES[process], mixture().target
    t, t1 = grid(sde, 1)
    x = sde.alpha(t) * target.sample(n, 1) + sde.sigma(t) * Streams(2, n)(torch.zeros(n, 2, dtype=torch.float64))
    return target.score(sde), x, flow(target.score(sde), sde, x[:16], t, t1, rtol=1e-12, atol=1e-12)


def mixture_error(run: Callable[..., Tensor], process: str, ts: Tensor) -> float:
    """RMS distance from the exact flow's endpoints."""
    score, x, exact = paths(process, SAMPLES)
    return float((run(score, PROCESSES[process], x[:16], ts) - exact).square().mean().sqrt())


def brownian(sde: SDE, ts: Tensor, z: Tensor) -> Noise:
    """The draws z (M, B, ...) of a grid of M steps, added up to those of the grid ts, which has every k-th point."""
    k = len(z) // (len(ts) - 1)
    first = sde.lam(ts[0])
    c = torch.exp(2 * (sde.lam(ts) - first))
    fine = torch.exp(2 * (sde.lam(_refined(sde, ts, k)) - first))
    dB = (z * fine.diff().sqrt().reshape(-1, *[1] * (z.ndim - 1))).unflatten(0, (-1, k)).sum(1)
    steps = iter(dB / c.diff().sqrt().reshape(-1, *[1] * (z.ndim - 1)))
    return lambda x: next(steps)


def _refined(sde: SDE, ts: Tensor, k: int) -> Tensor:
    return grid(sde, k * (len(ts) - 1))


def strong_order(run: Callable[..., Tensor], process: str, n: int) -> float:
    """log2 of the ratio of the distances of N from 2N and of 2N from 4N steps, on the same path."""
    sde = PROCESSES[process]
    score, x, _ = paths(process, SAMPLES)
    z = torch.randn(4 * n, *x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ends = [run(score, sde, x, ts, noise=brownian(sde, ts, z)) for ts in (grid(sde, m * n) for m in (1, 2, 4))]
    apart = [float((a - b).norm(dim=1).mean()) for a, b in pairwise(ends)]
    return math.log2(apart[0] / apart[1])


@dataclass(frozen=True)
class Row:
    """One certificate: N steps and 2N, network calls of N; `path`: strong order; empty where it does not apply."""

    sampler: str
    variant: str
    process: str
    order: int
    steps: int
    calls: int
    gaussian: float
    mixture: float | None
    path: float | None
    because: str

    @property
    def off(self) -> float:
        seen = [self.gaussian] if self.mixture is None else [self.gaussian, self.mixture]
        return max((abs(p - self.order) for p in seen), key=lambda d: math.inf if math.isnan(d) else d)


def certify(v: Variant, process: str) -> Row:
    sde = PROCESSES[process]
    two = [grid(sde, n, v.level) for n in (v.steps, 2 * v.steps)]
    asked = counted(gaussian_score(sde))
    v.run(asked, sde, law(sde, two[0][0])[0], two[0])
    (e, drawn), (e1, _) = (gaussian_error(v.run, sde, ts) for ts in two)
    weak, ode, strong = math.log2(e / e1), None, None
    if not drawn and v.mixture:
        d, d1 = (mixture_error(v.run, process, ts) for ts in two)
        ode = math.log2(d / d1)
    elif drawn == v.steps:
        strong = strong_order(v.run, process, min(max(v.steps // 2, 64), 128))
    return Row(v.sampler, v.name, process, v.order, v.steps, asked.calls, weak, ode, strong, v.because)


def claims(rows: Sequence[Row]) -> list[Claim]:
    """A row for each sampler in each SDE: its variant furthest off; and the strong orders."""
    made = []
    for name in dict.fromkeys(r.sampler for r in rows):
        for process in dict.fromkeys(r.process for r in rows):
            off = [r.off for r in rows if (r.sampler, r.process) == (name, process)]
            made.append(Claim(f"{name}, {process}: order off by, at most ({len(off)} variants)", max(off), "<=", 0.15))
    for process in dict.fromkeys(r.process for r in rows):
        strong = [abs(r.path - 1) for r in rows if r.process == process and r.path is not None]
        if strong:
            made.append(Claim(f"strong order 1, {process}: off by, at most", max(strong), "<=", 0.15))
    return made


def show(rows: Sequence[Row]) -> None:
    """A line a variant; three columns each for VP, sub-VP, VE."""
    by = {(r.variant, r.process): r for r in rows}
    names = list(dict.fromkeys(r.variant for r in rows))
    processes = list(dict.fromkeys(r.process for r in rows))
    width, third = max(map(len, names)), 7 * len(processes)
    head = "".join(f"{p:>7}" for p in processes)
    print(f"{'':{width}}                    {'Gaussian':^{third}} {'mixture':^{third}} {'path':^{third}}")
    print(f"{'variant':{width}} order    N  calls {head} {head} {head}")
    for name in names:
        here = [by[name, p] for p in processes]
        values = [[getattr(r, what) for r in here] for what in ("gaussian", "mixture", "path")]
        cells = " ".join("".join(f"{'' if v is None else f'{v:.2f}':>7}" for v in row) for row in values)
        r = here[0]
        print(f"{name:{width}} {r.order:5} {r.steps:4} {r.calls:6} {cells}  {r.because}".rstrip())


def draw(chosen: Sequence[Variant], file: Path, most: int) -> None:
    """Gaussian error against steps, a panel for each SDE, a line for each sampler as called."""
    from matplotlib.figure import Figure

    default = list({v.sampler: v for v in reversed(chosen)}.values())[::-1]
    steps = [2**k for k in range(3, most.bit_length())]
    figure = Figure(figsize=(6 * len(PROCESSES), 5), layout="constrained")
    for k, (process, sde) in enumerate(PROCESSES.items()):
        ax = figure.add_subplot(1, len(PROCESSES), k + 1, title=process, xlabel="steps")
        ax.set_ylabel("error of mean and variance")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        styles = ("-", "--", ":", "-.")
        for v in default:
            errors = [gaussian_error(v.run, sde, grid(sde, n, v.level))[0] for n in steps]
            ax.plot(steps, errors, styles[v.order - 1], linewidth=1, marker=".", label=f"{v.name}: {v.order}")
        if k == len(PROCESSES) - 1:
            ax.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    with whole(file) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def main(argv: list[str] | None = None) -> list[Claim]:
    p = parser(__doc__, "order_certificates")
    p.add_argument("--samplers", metavar="A,B", help="only these (default: all)")
    args = p.parse_args(argv)
    if start(args).type != "cpu":
        p.error("orders are seen in float64 on the CPU; leave --device out")
    chosen = variants()
    if args.samplers is not None:
        asked = args.samplers.split(",")
        if unknown := set(asked) - samplers.SAMPLERS.keys():
            p.error(f"unknown sampler {', '.join(sorted(unknown))}; choose from {', '.join(samplers.SAMPLERS)}")
        chosen = [v for v in chosen if v.sampler in asked]
    if args.quick:
        chosen = list({v.sampler: v for v in reversed(chosen)}.values())[::-1]
    rows = [certify(v, process) for v in tqdm(chosen, unit="variant", desc="certifying") for process in PROCESSES]
    show(rows)
    write_csv([asdict(r) for r in rows], args.out / "order_certificates.csv")
    draw(chosen, args.out / "order_certificates.png", 32 if args.quick else 256)
    print(f"table and picture: {args.out / 'order_certificates.csv'}, {args.out / 'order_certificates.png'}")
    made = claims(rows)
    report(made, args.json)
    return made


if __name__ == "__main__":
    main()
