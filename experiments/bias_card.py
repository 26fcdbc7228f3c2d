"""The bias card: which density every guidance rule samples, and how far that is from the one it is named after.

    python -m experiments.bias_card [--samples N]        # 14 minutes of one core

All scores are exact, and four times as many steps move no TV of a rule on the flow by more than 0.014 but two:
cfg-zero* at w = 8 (0.68, 0.57, 0.61 with 60, 240, 960 steps), whose field jumps where s_u = 0; apg with momentum
(w = 4: 0.47, 0.52 with 60, 240 steps), whose memory is of steps.  Three tables, each with the figure that as many exact
samples give (floor):

rules in the plane   three classes of two Gaussians; for each rule and w = 1, 1.5, 2, 4, 8 the total variation distance
                     (TV) of 30 x 30 cells to p_u^(1-w) p_c^w, by quadrature; the TV of the modes' masses; the share of
                     samples in the target's 90 % region; calls of the guided score a sample (s_c and s_u are one where
                     they share a network, two where they do not)
rules in 64-D        ten Gaussians made of handwritten digits, blurred so that they overlap; the target by importance
                     sampling from the class (effective share printed): sliced W2, sd ratio, share in each
                     coordinate's 90 % band.  Left out: product and AND, whose targets lie between two classes, so that
                     samples of one of them are worth 2 % and 8 % at w = 1 and less above; superposition, which
                     has no weight.  Where fewer than n samples' worth is left (NOT, perp-neg at large w) the figures
                     are NaN
inverse problems     half the pixels of a digit, noise 0.1, the posterior by algebra: sliced W2, sd ratio, 90 % band,
                     mean error in posterior standard deviations

Claims:
    w = 1 is exact: TV <= 0.01 above the floor for every rule that says so
    "exact" (conditional first, w late, Metropolis-adjusted moves): TV <= 0.030 at w = 4, 0.040 at w = 8, <= 400 calls
    "fast", the same with fewer steps: TV <= 0.10 at w = 4 with <= 60 calls
    the default posterior sampler: sliced W2 <= 0.055, sd ratio 0.95 to 1.05, band 0.88 to 0.92, <= 600 calls
    in 64-D "exact" and "fast" are at the floor: sliced W2 at most 1.15 times it at every w
    the whole run takes at most 900 CPU seconds

To expect (20 000 samples, seed 0): plain cfg on the flow TV 0.42, 0.72, 0.92 at w = 2, 4, 8 (floor 0.027), on the SDE
0.16, 0.28, 0.40; exact 0.025, 0.023, 0.024 with 305 calls, fast 0.026, 0.025, 0.025 with 60; in 64-D at w = 8 cfg 0.39,
exact 0.067, fast 0.064, floor 0.065; posterior: default 0.019, floor 0.016, mmps 0.084, pigdm 0.12, dps 0.21.
docs/guidance.md has the tables.

Writes OUT/bias_card.png, OUT/rules.csv, rules_64d.csv and inverse.csv, and tables.md, the tables in Markdown.
"""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from experiments.bias_inverse import INVERSE, judge
from experiments.bias_rules import METHODS, ONCE, Case, at_one, log_target
from experiments.certificate import CELLS, EDGE, cells, points, three_classes, tv
from experiments.common import Claim, parser, report, start, write_csv
from experiments.problems import problem, sliced_w2
from scoresde import VP
from scoresde.files import whole

WEIGHTS = (1.0, 1.5, 2.0, 4.0, 8.0)
Row = dict[str, Any]


def plane() -> Case:
    return Case(three_classes(), label=0, other=1, d=1.0, width=0.25, sde=VP(), t_end=1e-3)


def digits(blurred: float = 0.5) -> Case:
    """The digits' means and covariances; a variance `blurred` in every pixel makes the classes overlap: p(8 | x) of an
    eight is 0.80 on average, so that the tilt tells."""
    P = problem("digits")
    target = replace(P.target, floor=P.target.floor + blurred)
    d = math.sqrt(P.sigma_data**2 + blurred)
    return Case(target, label=8, other=3, d=d, width=math.sqrt(blurred), sde=P.sde, t_end=P.t_end)


def masses(case: Case, name: str, w: float, fine: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Of the target: each cell's mass, (CELLS^2 + 1,), each component's region's, (K,), and whether a cell is in the
    smallest set of cells with 90 % of it."""
    x = points(fine)
    p = torch.softmax(log_target(case, name, w, x), 0)
    mass = cells(x, p)
    order = mass.argsort(descending=True)
    inside = torch.zeros_like(mass).bool()
    inside[order[: int((mass[order].cumsum(0) < 0.9).sum()) + 1]] = True
    return mass, shares(case, x, p), inside


def shares(case: Case, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mass nearest to each component's mean, (K,)."""
    k = torch.cdist(x, case.target.means).argmin(1)
    weight = torch.full((len(x),), 1 / len(x), dtype=torch.float64) if weight is None else weight
    return torch.zeros(len(case.target.means), dtype=torch.float64).index_add(0, k, weight)


def in_plane(n: int, seed: int, weights: tuple[float, ...]) -> tuple[list[Row], dict[tuple[str, float], Tensor]]:
    case, rows, drawn = plane(), [], {}
    jobs = [(m, w) for m in METHODS if "images" not in m for w in weights] + [(m, math.nan) for m in ONCE]
    for name, w in tqdm(jobs, desc="rules in the plane"):
        x, calls = (METHODS | ONCE)[name](case, w, n, seed)
        mass, parts, inside = masses(case, name, w)
        exact = torch.multinomial(mass, n, replacement=True, generator=torch.Generator().manual_seed(seed))
        share = cells(x)
        rows.append(
            {"method": name, "w": w, "TV": tv(share, mass), "modes": tv(shares(case, x), parts),
             "coverage": float(share[inside].sum()) * 0.9 / float(mass[inside].sum()), "calls": calls,
             "floor": tv(torch.bincount(exact, minlength=len(mass)).double() / n, mass)}
        )  # fmt: skip
        drawn[name, w] = x
    return rows, drawn


def in_many(n: int, seed: int, weights: tuple[float, ...]) -> list[Row]:
    """Rules in 64-D, against importance samples of the class."""
    case, rows = digits(), []
    t = torch.tensor(case.t_end, dtype=torch.float64)
    pool = case.target.given(case.label).sample(20 * n, seed + 5)
    pool = case.sde.alpha(t) * pool + case.sde.sigma(t) * torch.randn(
        pool.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    log_c = case.target.given(case.label).log_prob(pool, case.sde, t)
    names = [m for m in METHODS if m not in ("product", "conjunction (AND)")]
    for name, w in tqdm([(m, w) for m in names for w in weights], desc="rules in 64-D"):
        x, calls = METHODS[name](case, w, n, seed)
        share = torch.softmax(log_target(case, name, w, pool) - log_c, 0)
        ess = 1 / float(share.square().sum()) / len(pool)
        drawn = pool[torch.multinomial(share, 2 * n, True, generator=torch.Generator().manual_seed(seed + 1))]
        one, two = drawn[:n], drawn[n:]
        mean = share @ pool.flatten(1)
        sd = (share @ (pool.flatten(1) - mean).square()).sqrt()
        low, high = two.flatten(1).quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), 0)
        y = x.flatten(1)
        row = {"method": name, "w": w, "sliced W2": sliced_w2(x, one), "floor": sliced_w2(two, one),
               "sd ratio": float((y.std(0) / sd).mean()), "band": float(((y >= low) & (y <= high)).double().mean()),
               "mean error": float(((y.mean(0) - mean) / sd).square().mean().sqrt()), "calls": calls,
               "target ESS": ess}  # fmt: skip
        known = ess * len(pool) >= n  # else the target itself is not known well enough to judge by
        rows.append(row if known else row | dict.fromkeys(list(row)[2:7], math.nan))
    return rows


def table(rows: list[Row]) -> None:
    print("\n" + f"{'method':24}" + "".join(f"{k:>12}" for k in list(rows[0])[1:]))
    for row in rows:
        print(f"{row['method']:24}" + "".join(f"{v:12.3g}" for v in list(row.values())[1:]))
    print(flush=True)


def cell(*values: float) -> str:
    """Figures side by side, three digits below 0.1."""
    if any(math.isnan(v) for v in values):
        return "-"
    return " / ".join(f"{v:.3f}" if abs(v) < 0.0995 else f"{v:.2f}" for v in values)


def by_weight(rows: list[Row], fields: tuple[str, ...], weights: tuple[float, ...]) -> list[str]:
    """A Markdown table, one row a method, one column a weight; a method without a weight fills the first."""
    at = {(r["method"], weights[0] if math.isnan(r["w"]) else r["w"]): r for r in rows}
    floors = {w: [r["floor"] for (_, v), r in at.items() if v == w and not math.isnan(r["floor"])] for w in weights}
    calls = {r["method"]: round(r["calls"]) for r in rows}
    lines = [[name, *(cell(*(at[name, w][f] for f in fields)) if (name, w) in at else "" for w in weights), str(n)]
             for name, n in calls.items()]  # fmt: skip
    floor = ["floor", *(f"{cell(min(f))} to {cell(max(f))}" if f else "-" for f in floors.values()), ""]
    return markdown([" / ".join(fields), *(f"w = {w:g}" for w in weights), "calls"], [floor, *lines])


def markdown(head: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *lines)]


def pages(plane: list[Row], many: list[Row], inverse: list[Row], weights: tuple[float, ...]) -> str:
    """The three tables in Markdown."""
    fields = list(inverse[0])[1:-1]
    calls = [[r["method"], *(cell(r[f]) for f in fields), f"{r['calls']:.0f}"] for r in inverse]
    return "\n".join(
        [*by_weight(plane, ("TV", "modes", "coverage"), weights), "",
         *by_weight(many, ("sliced W2", "sd ratio", "band"), weights), "",
         *markdown(["method", *fields, "calls"], calls), ""]
    )  # fmt: skip


def claims_of(plane: list[Row], many: list[Row], inverse: list[Row]) -> list[Claim]:
    at = {(r["method"], r["w"]): r for r in plane}
    once = max(r["TV"] - r["floor"] for r in plane if r["w"] == 1 and at_one(r["method"]))
    out = [Claim("w = 1: TV above the floor, worst rule", once, "<=", 0.01)]
    for name, w, goal in (("exact", 4.0, 0.03), ("exact", 8.0, 0.04), ("fast", 4.0, 0.1)):
        if (name, w) in at:
            out.append(Claim(f"{name}, w = {w:g}: TV", at[name, w]["TV"], "<=", goal))
    out.append(Claim("exact: calls", max(r["calls"] for r in plane if r["method"] == "exact"), "<=", 400))
    out.append(Claim("fast: calls", max(r["calls"] for r in plane if r["method"] == "fast"), "<=", 60))
    worst = max(r["sliced W2"] / r["floor"] for r in many if r["method"] in ("exact", "fast"))
    out.append(Claim("exact and fast in 64-D: sliced W2 over the floor", worst, "<=", 1.15))
    for r in inverse:
        if r["method"].startswith("twisted"):
            out += [
                Claim("default posterior: sliced W2", r["sliced W2"], "<=", 0.055),
                Claim("default posterior: |sd ratio - 1|", abs(r["sd ratio"] - 1), "<=", 0.05),
                Claim("default posterior: |band - 0.9|", abs(r["band"] - 0.9), "<=", 0.02),
                Claim("default posterior: calls", r["calls"], "<=", 600),
            ]
    return out


def main(argv: list[str] | None = None) -> list[Claim]:
    p = parser(__doc__, "bias_card")
    p.add_argument("--samples", type=int, default=20_000, metavar="N", help="in the plane; a twentieth in 64-D")
    args = p.parse_args(argv)
    if start(args).type != "cpu":
        p.error(f"this script runs in float64 on the CPU; got --device {args.device}")
    began = time.process_time()
    n = min(args.samples, 1000) if args.quick else args.samples
    weights = (1.0, 4.0) if args.quick else WEIGHTS
    plane_rows, drawn = in_plane(n, args.seed, weights)
    table(plane_rows)
    many = in_many(max(100, n // 20), args.seed, weights)
    table(many)
    inverse = judge(
        max(100, n // 20), args.seed, cases=1 if args.quick else 2, only=("dps", "twisted") if args.quick else INVERSE
    )
    table(inverse)
    for name, rows in (("rules", plane_rows), ("rules_64d", many), ("inverse", inverse)):
        write_csv(rows, args.out / f"{name}.csv")
    with whole(args.out / "tables.md") as temporary:
        temporary.write_text(pages(plane_rows, many, inverse, weights))
    picture(drawn, weights, args.out / "bias_card.png")
    print(f"tables and picture in {args.out}\n")
    claims = claims_of(plane_rows, many, inverse)
    claims.append(Claim("whole run, CPU seconds", time.process_time() - began, "<=", 900))
    report(claims, args.json)
    return claims


def picture(drawn: dict[tuple[str, float], Tensor], weights: tuple[float, ...], file: Path) -> None:
    """Samples over the target, one row a rule, one column a weight."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    case, names = plane(), [m for m in METHODS if (m, weights[0]) in drawn]
    fig, axes = plt.subplots(
        len(names),
        len(weights),
        figsize=(2 * len(weights), 0.85 * len(names) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for k, (row, name) in enumerate(zip(axes, names, strict=True)):
        for ax, w in zip(row, weights, strict=True):
            mass = masses(case, name, w, fine=4)[0][:-1].reshape(CELLS, CELLS).T
            ax.imshow(mass.numpy(), origin="lower", extent=(-EDGE, EDGE, -EDGE, EDGE), cmap="Blues")
            ax.plot(*drawn[name, w][:500].T.numpy(), ".", ms=1, color="tab:red", alpha=0.5)
            ax.set(xlim=(-EDGE, EDGE), ylim=(-1.2, 1.2), xticks=[], yticks=[])
            if k == 0:
                ax.set_title(f"w = {w:g}", fontsize=9)
        row[0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
    fig.suptitle("blue: the density a rule is named after;  red: what it samples", fontsize=10)
    with whole(file) as temporary:
        fig.savefig(temporary, dpi=100, format="png")
    plt.close(fig)


if __name__ == "__main__":
    main()
