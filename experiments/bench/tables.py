"""Tables, pictures and claims of the work-precision study."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments import peers as others
from experiments.bench.runs import Row, best
from experiments.common import Claim
from experiments.problems import AUTO, TABLE
from scoresde.files import whole

CLAIMED = (10, 20, 50)


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
