"""Work and precision: error of the endpoint against network calls, on problems whose flow is known.

    python -m experiments.work_precision                      ours, on the three problems of the claims
    python -m experiments.work_precision --peers              and six other libraries beside (see experiments.peers)
    python -m experiments.work_precision --problems digits --samplers heun,angle:order=4 --nfe 5,10,20
    python -m experiments.work_precision --peers --samplers searched,calibrated --ours calibrated   what fitting gains
    python -m experiments.work_precision --peers --law 8192 --samplers angle:tau=0.5,sde_dpmpp --nfe 10,15,20   noise
    python -m experiments.work_precision --model out/quickstart/model.safetensors

Every sampler starts from the same exact draws and runs on every grid with as many steps as its counted
calls allow; the best grid *with hindsight* is shown, for ours as for the peers'.  A peer runs on the
other libraries' grids, too, which flatters it; what it does on the grids it ships is shown apart.
`--ours` (on `--grid`) is held against the best of all peers on the best of all grids.
Claims, on 2d, 64d and 16d at 10, 20 and 50 calls: its error at most half the best peer's; and from 20
calls on, at most half the calls for the best peer's error.  On the six problems of `auto`: within 5 % of
the best peer at every budget, and strictly best at two thirds.  Without --peers there is nothing to claim.
To expect with --ours calibrated: error ratios 0.02 to 0.24, share of the calls 0.33 to 0.43: all hold; on the
six of `auto` 0.62 at worst, strictly best in 42 of 42.  With --ours searched: 0.03 to 0.47; 0.40 to 0.75, two of nine;
on the six 1.006 at worst, 41 of 42.  Nothing fitted (angle on data_scale): 0.09 to 0.95, two of nine fail, at 10
calls; 1.4 to 4.0 at worst on four of the six; 28 of 42.

The error is log10 of rms95 in data units (see `experiments.problems`) against the exact flow from the same noise.
`--law N` adds the distances of the laws of N samples (`experiments.bench.laws`), always with what exact draws give
beside them; that is the study of samplers that draw noise, ours and with --peers those of the libraries.  Its claim:
the first sampler named is nowhere behind the best stochastic peer on its best grid (distances below 1.1 floors count
as that).  To expect of angle:tau=0.5: holds on 2d and 16d from 10 calls on.  Writes OUT/work_precision.csv, .png and
laws.csv; endpoints of the exact flow and results of the peers are kept in OUT and taken from there the second time.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from experiments import peers as others
from experiments.bench.laws import NOISY, Law, Truth, claims, laws, show
from experiments.bench.methods import Case, deterministic, is_noisy, our_grids, ours, theirs
from experiments.bench.runs import Row, digest, every, exact_case, kept, measure, model_case, screened, versions
from experiments.bench.tables import claims_against_peers, claims_on_auto, draw, table
from experiments.common import Claim, parser, report, start, write_csv
from experiments.problems import NAMES, TABLE, problem

NFE = (5, 8, 10, 15, 20, 35, 50)


def law_rows(
    case: Case, asked: list[str], grids: list[str], libraries: tuple[str, ...], args: argparse.Namespace
) -> list[Law]:
    """The laws of ours, and of the libraries' samplers that draw noise, kept in OUT."""
    p = problem(case.name)
    truth = Truth(p, args.law, args.seed)
    mine = [m for spec in asked for m in ours(spec, grids, noise=torch.randn_like)]
    rows = laws(p, mine, args.nfe, truth)
    if libraries:
        key = f"{versions(libraries)}; {digest(case)}, {args.law} of seed {args.seed}, calls {args.nfe}"
        make = lambda: laws(p, theirs(case, libraries, noisy=True), args.nfe, truth)  # noqa: E731
        rows += kept(args.out / f"laws-{p.name}.json", key, make, Law)
    show(rows, args.nfe)
    return rows


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
    p.add_argument(
        "--law", type=int, default=0, metavar="N", help="distances of the laws of N samples, with their floors"
    )
    p.add_argument("--model", type=Path, metavar="FILE", help="a trained network instead of the exact problems")
    args = p.parse_args(argv)
    start(args)
    n = 32 if args.quick else args.n
    budgets = args.nfe = args.nfe[:3] if args.quick else args.nfe
    chosen = list(our_grids()) if args.grids is None else args.grids.split(",")
    rows: list[Row] = []
    distances: list[Law] = []
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
            flow = [spec for spec in asked if not is_noisy(case, spec)] if asked else deterministic(case)
            noisy = [spec for spec in asked if spec not in flow] if asked else list(NOISY)
            if asked and noisy and not args.law:
                raise ValueError(f"{noisy[0]} draws noise: its endpoint is not the flow's; give --law N for its law")
            if args.law and not args.model:
                distances += law_rows(case, noisy + (flow if asked else []), chosen, libraries, args)
            if not flow:
                continue
            half = {
                n // 2 for n in budgets if n >= 20 and libraries and name in TABLE
            }  # where half the calls are claimed to be enough
            mine = [m for spec in flow for m in ours(spec, chosen)]
            here = measure(case, every(mine, sorted({*budgets, *half})))
            if libraries:
                key = f"{versions(libraries)}; {digest(case)}, calls {budgets}"

                def run(case: Case = case) -> list[Row]:
                    return screened(case, theirs(case, libraries), budgets)

                here += kept(args.out / f"peers-{name}.json", key, run, Row)
            table(here, budgets, name)
            rows += here
    except (ValueError, ImportError, OSError) as err:
        p.error(str(err))
    made = claims_against_peers(rows, args.ours, args.grid) + claims_on_auto(rows, args.ours, args.grid)
    if distances:
        write_csv([asdict(r) for r in distances], args.out / "laws.csv")
        print(f"\n{args.out / 'laws.csv'}")
        made += claims(distances, next(r.sampler for r in distances))
    if rows:
        write_csv([asdict(r) for r in rows], args.out / "work_precision.csv")
        draw(rows, budgets, args.out / "work_precision.png")
        print(f"\n{args.out / 'work_precision.csv'}, {args.out / 'work_precision.png'}")
    report(made, args.json)
    return made


if __name__ == "__main__":
    main()
