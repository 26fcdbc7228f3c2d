"""How many bits a digit costs: the flow's likelihood, the variational bound and I-MMSE of one network, side by side.

    python -m experiments.digits_likelihood            # trains for 15 minutes of one core, then rates for 3

A class-conditional U-Net (width 24, dropout 0.15) on four fifths of scikit-learn's digits, 17 levels, 8 x 8.  Claims:
    held-out bits/dim by the flow, dequantised uniformly, given the class          <= 1.74
    it moves by no more than 0.005 when the solver's calls are doubled
    the order theory asks for: the cells' masses by 5 draws cost no more than by 1, and no more than uniform
    dequantisation; the variational bound no less than the flow; with bars (one standard error of the paired
    differences) of at most 0.01
    Bayes' rule over the ten class likelihoods is right for >= 0.97 of the held-out digits

To expect (seed 0, 360 held-out items, 880 s of training; ± one standard error over items): flow 1.712 ± 0.012
(training items 1.535), twice the calls 1.711; cells' masses 1.721 with one fitted draw, 1.672 with five; bound 1.787,
I-MMSE 1.783, bound - flow 0.075 ± 0.004; Bayes' rule 0.992.  Everything is paired: the same items, in bits/dim.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from experiments.common import Claim, error_bar, parser, report, start
from experiments.digits import Images, load
from experiments.rating import How, Task, bounded, prepare, rate
from scoresde import EDM, Model, Streams, bits_per_dim, gaussian_of
from scoresde.checkpoint import load_model, read
from scoresde.discrete import importance_bound
from scoresde.nets import UNet
from scoresde.train import train

SDE = EDM(T=20.0, t_min=0.005)


def trained(data: Images, args: argparse.Namespace) -> Model:
    """The model from its file, trained first if that is not there or was trained for less."""
    path = args.out / "model.safetensors"
    about = {"seed": args.seed, "shape": list(data.x.shape[1:]), "levels": data.levels, "low": -1.0, "high": 1.0}
    if path.exists() and read(path, "none")[1].get("data") == about and read(path, "none")[1]["seconds"] >= args.budget:
        print(f"reusing {path}")
        return load_model(path)[0]
    path.unlink(missing_ok=True)
    torch.manual_seed(args.seed)
    net = UNet(width=24, dropout=0.15, classes=len(data.names))
    model = Model(net, SDE, "F", sigma_data=float(data.densities().std()), classes=len(data.names))

    def batch(n: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(data), (n,))
        return data.densities(rows), data.y[rows]

    train(model, batch, seconds=args.budget, batch_size=64, seed=args.seed, path=path, extra={"data": about})
    return load_model(path)[0]


def over(task: Task, what: str, of: Callable[[Task, list[int]], Tensor]) -> Tensor:
    """of(task, rows), a row an item, over all of the task's items in their order."""
    parts = task.order.split(task.how.batch)
    return torch.cat([of(task, part.tolist()) for part in tqdm(parts, desc=what, unit="batch")])


def right(task: Task, classes: int) -> float:
    """How often the class of the least bits is right, classes equally likely; the same noise for all."""
    assert task.labels is not None
    asked = [replace(task, labels=torch.full_like(task.labels, c)) for c in range(classes)]
    bits = [over(t, f"as class {c}", lambda t, rows: rate(t, rows)[0]) for c, t in enumerate(asked)]
    return float((torch.stack(bits).argmin(0) == task.labels[task.order]).double().mean())


def main(argv: list[str] | None = None) -> list[Claim]:
    p = parser(__doc__, "digits_likelihood")
    p.add_argument("--budget", type=float, default=None, metavar="S", help="seconds of training (880; with --quick 20)")
    args = p.parse_args(argv)
    start(args)
    args.budget = args.budget or (20.0 if args.quick else 880.0)
    n, K, few = (24, 2, 8) if args.quick else (360, 5, 20)
    steps, probes, calls = (16, 1, 32) if args.quick else (32, 4, 128)
    how = How(steps=steps, probes=probes, calls=calls, batch=120, seed=args.seed)
    data, held = load(None, args.seed)
    model = trained(data, args)
    reference = gaussian_of(data.densities(noise=Streams(args.seed, len(data))))

    def items(images: Images, **other: Any) -> Task:
        grid, asked = (images.levels, -1.0, 1.0), replace(how, **other)
        return replace(prepare(model, images.x, images.y, grid, asked, args.out, n), reference=reference)

    test = items(held)
    value = over(test, "flow", lambda t, rows: rate(t, rows)[0])
    refined = over(test, "flow, twice the calls", lambda t, rows: rate(t, rows, finer=True)[0])
    train_value = over(items(data), "flow, training items", lambda t, rows: rate(t, rows)[0])
    cells = items(held, dequantize="fitted", importance=K)
    terms = over(cells, f"cells, K = {K}", lambda t, rows: rate(t, rows)[2].T)  # (N, K)
    one, many = (bits_per_dim(importance_bound(terms.T, k), test.D, 1.0) for k in (1, K))
    found = over(test, "bound", lambda t, rows: torch.stack([*bounded(t, rows).values()], 1))
    prior, diffusion, reconstruction, immse, _ = found.unbind(1)
    density = prior + diffusion + reconstruction
    bayes = right(items(held, steps=few), len(held.names))

    def line(name: str, v: Tensor, note: str = "") -> None:
        mean, error = error_bar(v)
        print(f"{name:<46}{mean:8.4f} ± {error:.4f}   {note}")

    print(f"\nbits/dim over {n} items, ± one standard error over items\n")
    line("flow, uniform dequantisation, held out", value)
    line("  the same, twice the calls", refined)
    line("  the same, training items", train_value)
    line("flow, cells' masses, 1 fitted draw", one)
    line(f"flow, cells' masses, {K} fitted draws", many)
    line("variational bound, uniform dequantisation", density, "= the three below")
    for name, v in (("prior", prior), ("diffusion", diffusion), ("reconstruction", reconstruction)):
        line(f"  {name}", v)
    line("I-MMSE, uniform dequantisation", immse)
    print("\npaired differences")
    line("bound - flow", density - value)
    line("bound - I-MMSE", density - immse, "the ends of the noise range, which I-MMSE takes from N(m, C)")
    line("uniform - fitted draw", value - one, "what uniform dequantisation loses")
    print()
    bars = max(error_bar(v)[1] for v in (density - value, density - immse, many - one))
    claims = [
        Claim("seconds of training", read(args.out / "model.safetensors", "none")[1]["seconds"], "<=", 900),
        Claim("held-out bits/dim", float(value.mean()), "<=", 1.74),
        Claim("change when the calls are doubled", abs(float((refined - value).mean())), "<=", 0.005),
        Claim(f"cells' masses: {K} draws less 1", float((many - one).mean()), "<=", 0.0),
        Claim("cells' masses less uniform dequantisation", float((many - value).mean()), "<=", 0.0),
        Claim("bound less flow", float((density - value).mean()), ">=", 0.0),
        Claim("largest bar of a difference", bars, "<=", 0.01),
        Claim("Bayes' rule is right", bayes, ">=", 0.97),
    ]
    report(claims, args.json)
    return claims


if __name__ == "__main__":
    main()
