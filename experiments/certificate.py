"""Which density does a guided flow sample?  Classifier-free guidance, certified.

    python -m experiments.certificate [--samples N]        # three minutes
    python -m experiments.certificate --model out/quickstart/model.safetensors [--label C]

Three classes of two Gaussians each in the plane, all scores exact.  For each rule and weight w the probability flow's
samples come with log q, and with it KL(q || pi) to the density the rule is named after, pi = p(x) p(c|x)^w / Z, the
effective samples of the weights pi/q and the index of their tail (`guidance.certify`, which needs no exact scores).
Z is known here, by a grid: KL with it is right at every w, while with the Z that the samples estimate, and for
everything else made of the weights (whose mean is 1 in expectation), the tail decides.  Beside it, by counting in
30 x 30 cells, the total variation distance (TV) to pi, before and after reweighting, and that of as many exact
samples (floor).  Claims:
    w = 1 is exact: KL <= 0.005 nats
    the certificate sees what counting sees: KL grows with w as TV does, and TV <= sqrt(KL/2) + floor   (Pinsker)
    the alarm is heard: where reweighting leaves more than 0.05 above the floor, the tail index is above 1/2

To expect (20 000 samples, seed 0): classifier-free guidance, w = 1.5, 2, 4, 8: KL 0.25, 0.68, 2.5, 6.0 nats, TV 0.26,
0.42, 0.72, 0.92, tail 0.68 to 0.99, so no reweighting helps; in the interval 0.2..2 of sigma/alpha KL 0.20, 0.57, 2.1,
4.8 nats, and at w = 1.5 reweighting brings TV from 0.23 to 0.06.

With --model, in three minutes, the same of a trained class-conditional network and one class, by the densities of the
network's own flows (`experiments.certificate_model`).

Writes OUT/certificate.png and OUT/certificate.csv.
"""

import itertools
import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

import guidance
from experiments import certificate_model
from experiments.common import Claim, parser, report, start, write_csv
from scoresde import VP, Mixture, Score, Streams, mixture
from scoresde.files import whole

SDE, T0, CLASS, CELLS, EDGE = VP(), 1e-3, 0, 30, 3.0
T = torch.tensor(T0, dtype=torch.float64)


def three_classes() -> Mixture:
    """Six Gaussians, two a class, of unlike widths, on a ring whose neighbours are of other classes."""
    angle = torch.arange(6, dtype=torch.float64) * math.pi / 3
    means = 1.3 * torch.stack([angle.cos(), angle.sin()], 1)
    var = torch.tensor([0.06, 0.1, 0.15, 0.1, 0.06, 0.15], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 1.5, 1.0, 2.0, 1.0], dtype=torch.float64)
    return mixture(weights, means, var=var, labels=torch.arange(6) % 3)


def log_tilted(target: Mixture, w: float, x: Tensor) -> Tensor:
    """log p(x) p(c|x)^w at T0, up to a constant."""
    return (1 - w) * target.log_prob(x, SDE, T) + w * target.given(CLASS).log_prob(x, SDE, T)


def cells(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """The share of samples in each cell, (CELLS^2 + 1,), the last for all outside."""
    k = ((x + EDGE) / (2 * EDGE) * CELLS).floor().long()
    index = torch.where(((k >= 0) & (k < CELLS)).all(1), k[:, 0] * CELLS + k[:, 1], CELLS**2)
    weight = torch.full((len(x),), 1 / len(x), dtype=torch.float64) if weight is None else weight
    return torch.zeros(CELLS**2 + 1, dtype=torch.float64).index_add(0, index, weight)


def points(fine: int) -> Tensor:
    """The middles of fine^2 squares in each cell, (CELLS^2 fine^2, 2)."""
    n = CELLS * fine
    axis = -EDGE + 2 * EDGE * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)


def truth(target: Mixture, w: float, fine: int = 10) -> tuple[Tensor, float]:
    """The tilted density's mass in each cell and log Z, by the midpoint rule on fine^2 points a cell."""
    x = points(fine)
    log_f = log_tilted(target, w, x)
    return cells(x, torch.softmax(log_f, 0)), float(log_f.logsumexp(0)) + 2 * math.log(2 * EDGE / (CELLS * fine))


def tv(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().sum() / 2)


def rule(target: Mixture, name: str, w: float) -> Score:
    cond, uncond = target.given(CLASS).score(SDE), target.score(SDE)
    if name == "interval":
        return guidance.cfg(cond, uncond, w, sde=SDE, interval=(0.2, 2.0))
    return guidance.cfg(cond, uncond, w)


def main(argv: list[str] | None = None) -> list[Claim]:
    p = parser(__doc__, "certificate")
    p.add_argument("--samples", type=int, metavar="N", help="for each rule and weight (20000; of a network 240)")
    p.add_argument("--model", type=Path, metavar="FILE", help="certify this network, a checkpoint written by training")
    p.add_argument("--label", type=int, default=0, metavar="C", help="its class to guide to (%(default)s)")
    args = p.parse_args(argv)
    device = start(args)
    wanted = (20_000 if args.model is None else 240) if args.samples is None else args.samples
    if wanted < 2:
        p.error(f"--samples must be at least 2, got {wanted}")
    if args.model is not None:
        try:
            claims = certificate_model.run(args.model, args.label, wanted, args.out, args.seed, device, args.quick)
        except (ValueError, OSError) as err:
            p.error(str(err))
        report(claims, args.json)
        return claims
    n = min(wanted, 2000) if args.quick else wanted
    weights = (1.0, 2.0, 4.0) if args.quick else (1.0, 1.5, 2.0, 4.0, 8.0)
    target, rows, drawn = three_classes(), [], {}
    x_T = Streams(args.seed, n)(torch.empty(n, 2, dtype=torch.float64))
    for name, w in tqdm([(name, w) for name in ("cfg", "interval") for w in weights], desc="certifying"):
        mass, log_z = truth(target, w)

        def log_pi(x: Tensor, w: float = w, log_z: float = log_z) -> Tensor:
            return log_tilted(target, w, x) - log_z

        got = guidance.certify(rule(target, name, w), SDE, x_T, log_pi, t=T0, normalised=True, d=1.0, tol=1e-3)
        weight, mean_w = torch.softmax(got.log_w, 0), float(got.log_w.exp().mean())
        exact = torch.multinomial(mass, n, replacement=True, generator=torch.Generator().manual_seed(args.seed))
        rows.append(
            {"rule": name, "w": w, "KL": got.kl, "error": got.kl_error, "mean w": mean_w,
             "KL, own Z": got.kl + math.log(mean_w), "ESS/n": got.ess / n, "tail": got.tail,
             "TV": tv(cells(got.x), mass), "reweighted": tv(cells(got.x, weight), mass),
             "floor": tv(torch.bincount(exact, minlength=len(mass)).double() / n, mass)}
        )  # fmt: skip
        drawn[name, w] = got.x
    print("\n" + "  ".join(f"{k:>10}" for k in rows[0]))
    for row in rows:
        print("  ".join(f"{v:>10}" if isinstance(v, str) else f"{v:10.3g}" for v in row.values()))
    write_csv(rows, args.out / "certificate.csv")
    picture(target, weights, drawn, args.out / "certificate.png")
    print(f"\ntable: {args.out / 'certificate.csv'}, picture: {args.out / 'certificate.png'}\n")
    plain = [r for r in rows if r["rule"] == "cfg"]
    slack = max(r["TV"] - r["floor"] - math.sqrt(max(r["KL"], 0.0) / 2) for r in rows)
    falls = max(a[k] - b[k] for a, b in itertools.pairwise(plain) for k in ("KL", "TV"))
    failed = [r["tail"] for r in rows if r["reweighted"] > r["floor"] + 0.05]
    claims = [
        Claim("w = 1: KL, nats", abs(plain[0]["KL"]), "<=", 0.005),
        Claim("KL and TV grow with w: largest fall", falls, "<=", 0.0),
        Claim("TV above Pinsker's sqrt(KL/2) and the floor", slack, "<=", 0.0),
        Claim("least tail index where reweighting fails", min(failed, default=math.inf), ">=", 0.5),
    ]
    report(claims, args.json)
    return claims


def picture(target: Mixture, weights: tuple[float, ...], drawn: dict[tuple[str, float], Tensor], file: Path) -> None:
    """Samples of the guided flow over the tilted density, one panel a weight."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, len(weights), figsize=(3.2 * len(weights), 3.4), squeeze=False)
    for ax, w in zip(axes[0], weights, strict=True):
        mass = truth(target, w)[0][:-1].reshape(CELLS, CELLS).T
        ax.imshow(mass.numpy(), origin="lower", extent=(-EDGE, EDGE, -EDGE, EDGE), cmap="Blues")
        x = drawn["cfg", w][:800]
        ax.plot(*x.T.numpy(), ".", ms=1.5, color="tab:red", alpha=0.5)
        ax.set(title=f"w = {w:g}", xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), xticks=[], yticks=[])
    fig.suptitle("blue: the tilted density;  red: what classifier-free guidance samples", fontsize=10)
    fig.tight_layout()
    with whole(file) as temporary:
        fig.savefig(temporary, dpi=110, format="png")
    plt.close(fig)


if __name__ == "__main__":
    main()
