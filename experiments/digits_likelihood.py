"""How many bits a digit costs: the flow's likelihood, the variational bound and I-MMSE of one network, side by side.

    python -m experiments.digits_likelihood            # trains for 15 minutes of one core, then rates for 3

A class-conditional U-Net (width 24, dropout 0.15) on four fifths of scikit-learn's digits, 17 levels, 8 x 8.  Claims:
    held-out bits/dim by the flow, dequantised uniformly, given the class          <= 1.74
    it moves by no more than 0.005 when the solver's calls are doubled
    the order theory asks for: the cells' masses by 5 draws cost no more than by 1, and no more than uniform
    dequantisation; the variational bound no less than the flow; with bars (one standard error of the paired
    differences) of at most 0.01
    Bayes' rule over the ten class likelihoods is right for >= 0.97 of the held-out digits

To expect (seed 0, 360 held-out items, 880 s of training; ± one standard error over items): flow 1.716 ± 0.012
(training items 1.539), twice the calls 1.714; cells' masses 1.725 with one fitted draw, 1.676 with five; bound 1.789,
I-MMSE 1.785, bound - flow 0.072 ± 0.004; Bayes' rule 0.994.  Everything is paired: the same items, in bits/dim.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from experiments.common import Claim, error_bar, parser, report, start
from experiments.digits import Images, load
from scoresde import (
    EDM,
    Mixture,
    Model,
    Streams,
    bits_per_dim,
    bounds,
    code_length,
    dequantize,
    gaussian_of,
    log_prob,
)
from scoresde.checkpoint import load_model, read
from scoresde.discrete import fitted, importance_bound
from scoresde.nets import UNet
from scoresde.train import train

SDE = EDM(T=20.0, t_min=0.005)
BATCH = 120
Stream = Callable[[int], Streams]
Rate = Callable[[Tensor, Tensor, Stream], Tensor]  # (levels, labels, stream) -> a row an item


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


class Rated:
    """Values of one set of images under a model, (N,) bits/dim each; items keep their streams whatever the batch."""

    def __init__(self, model: Model, images: Images, n: int, seed: int) -> None:
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n]
        self.model, self.images, self.rows, self.seed = model, images, rows, seed
        self.D, self.width = images.x[0].numel(), images.bin_width

    def each(self, what: str, rate: Rate) -> Tensor:
        """rate(x, y, stream) over batches; stream(k) is the items' k-th set of noise streams."""
        out = []
        for part in tqdm(torch.arange(len(self.rows)).split(BATCH), desc=what, unit="batch"):
            rows = self.rows[part]

            def stream(k: int, part: Tensor = part) -> Streams:
                return Streams(1000 * self.seed + k, part.tolist())

            out.append(rate(self.images.x[rows], self.images.y[rows], stream))
        return torch.cat(out)

    def log_prob(self, x: Tensor, y: Tensor | int, noise: Streams, calls: int, probes: int) -> Tensor:
        return log_prob(
            self.model.given(y), SDE, x, method="multistep", steps=calls, probes=probes, noise=noise,
            d=self.model.sigma_data,
        )  # fmt: skip

    def density(self, k: Tensor, noise: Streams) -> Tensor:
        return dequantize(k, self.images.levels, -1.0, 1.0, noise)

    def flow(self, calls: int, probes: int) -> Tensor:
        def rate(k: Tensor, y: Tensor, stream: Stream) -> Tensor:
            return bits_per_dim(
                self.log_prob(self.density(k, stream(0)), y, stream(1), calls, probes), self.D, self.width
            )

        return self.each(f"flow, {calls} calls", rate)

    def cells(self, K: int, calls: int, probes: int) -> Tensor:
        """(N, K): the terms of the importance-weighted bound, each its own fitted draw, probes shared by the draws."""

        def rate(k: Tensor, y: Tensor, stream: Stream) -> Tensor:
            return code_length(
                lambda v: self.log_prob(v, y, stream(1), calls, probes), k, self.images.levels, -1.0, 1.0,
                dequantizer=fitted(self.model.given(y), SDE), K=K, noise=stream(2),
            ).terms.T  # fmt: skip

        return self.each(f"cells, K = {K}", rate)

    def bound(self, reference: Mixture, calls: int) -> Tensor:
        """(N, 5): prior, diffusion, reconstruction and total of the bound, and I-MMSE; of the dequantised density."""

        def rate(k: Tensor, y: Tensor, stream: Stream) -> Tensor:
            found = bounds(
                self.model.given(y), SDE, self.density(k, stream(0)), reference, calls=calls, noise=stream(3)
            )
            parts = [bits_per_dim(-v, self.D, 1.0) for v in found[:3]]  # which add up to the total but for log2 w
            return torch.stack([*parts, *(bits_per_dim(-v, self.D, self.width) for v in (found.total, found.immse))], 1)

        return self.each("bound", rate)

    def bayes(self, calls: int, probes: int) -> float:
        """How often the class of the highest likelihood is right, classes equally likely; the same noise for all."""

        def rate(k: Tensor, y: Tensor, stream: Stream) -> Tensor:
            x = self.density(k, stream(0))
            values = [self.log_prob(x, c, stream(1), calls, probes) for c in range(len(self.images.names))]
            return torch.stack(values).argmax(0) == y

        return float(self.each("Bayes", rate).double().mean())


def main(argv: list[str] | None = None) -> list[Claim]:
    p = parser(__doc__, "digits_likelihood")
    p.add_argument("--budget", type=float, default=None, metavar="S", help="seconds of training (880; with --quick 20)")
    args = p.parse_args(argv)
    start(args)
    args.budget = args.budget or (20.0 if args.quick else 880.0)
    n, calls, probes, K, nodes, few = (24, 16, 1, 2, 32, 8) if args.quick else (360, 32, 4, 5, 128, 20)
    data, held = load(None, args.seed)
    model = trained(data, args)
    reference = gaussian_of(data.densities(noise=Streams(args.seed, len(data))))
    test, seen = Rated(model, held, n, args.seed), Rated(model, data, n, args.seed)

    value, refined, train_value = test.flow(calls, probes), test.flow(2 * calls, probes), seen.flow(calls, probes)
    terms = test.cells(K, calls, probes)
    one, many = (bits_per_dim(importance_bound(terms.T, k), test.D, 1.0) for k in (1, K))
    prior, diffusion, reconstruction, density, immse = test.bound(reference, nodes).unbind(1)
    right = test.bayes(few, probes)

    def line(name: str, v: Tensor, note: str = "") -> None:
        mean, error = error_bar(v)
        print(f"{name:<46}{mean:8.4f} ± {error:.4f}   {note}")

    print(f"\nbits/dim over {n} items, ± one standard error over items\n")
    line("flow, uniform dequantisation, held out", value)
    line("  the same, twice the calls", refined)
    line("  the same, training items", train_value)
    line("flow, cells' masses, 1 fitted draw", one)
    line(f"flow, cells' masses, {K} fitted draws", many)
    line("variational bound, uniform dequantisation", density, "= the three below - log2(bin width)")
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
        Claim("Bayes' rule is right", right, ">=", 0.97),
    ]
    report(claims, args.json)
    return claims


if __name__ == "__main__":
    main()
