"""CLIP guidance of an unconditional model: what it reaches, what it costs, what it samples.

Claims (the quickstart's network and CLIP, distance="softmax", Heun with 25 steps and all the re-noising it allows;
means over 3 seeds of 1000 samples):
    an independent classifier reads >= 0.97 of the samples as the prompted digit, at a Frechet distance at
    most 10 above that of unguided samples, with at most 100 network calls each;
    the cheap way (through=False: no Jacobian of the network; twice the scale; off below sigma = 0.05 and
    above 8) is within 0.03 of that accuracy in at most three quarters of the time;
    {three: w, eight: 1 - w}: the share of threes rises with w and is within 0.1 of it.

To expect with seed 0 (training's budget is time, so a run differs a little): 0.981 ± 0.007 at 3 above the unguided
distance of 38, 50 calls; the cheap way 0.986 in 0.6 of the time; shares 0.02, 0.23, 0.47, 0.73, 0.99 for
w = 0, 1/4, 1/2, 3/4, 1; four minutes of one core.

Writes samples.png (a column for each prompt: two rows unguided, eight guided), mixture.png (a row for each w),
gradient_R.png (what guidance does to the estimate at sigma/alpha = R) and others.png (a row for each other rule).
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import guidance
import samplers
from experiments import quickstart
from experiments.common import Claim, parser, picture, report, start
from experiments.digits import Images, Judge, load, to_levels
from experiments.digits_clip import PLAIN
from experiments.yardsticks import Features
from samplers import grids
from scoresde import Model, Score, Streams, counted, prior_sample
from scoresde.checkpoint import load_model

Rule = Callable[[Score, guidance.Energy], Score]
SCALE = 6.0
ACTS = (0.05, 8.0)  # sigma/alpha, of the cheap way
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Setup:
    """What is guided, by what, and who judges."""

    model: Model
    clip: tuple[Any, Any]
    held: Images
    judge: Judge
    features: Features
    device: torch.device
    each: int = 100  # samples a prompt
    steps: int = 25
    churn: bool = True  # all the re-noising that Heun allows

    @property
    def prompts(self) -> list[str]:
        return [PLAIN[0].format(name) for name in self.held.names]

    def energy(self, weights: dict[str, float], distance: str = "softmax") -> guidance.Energy:
        others = [p for p in self.prompts if p not in weights] if distance == "softmax" else []
        return guidance.clip_energy(*self.clip, weights, against=others, distance=distance)

    def run(self, score: Score, noise: Streams) -> Tensor:
        shape = (len(noise.generators), *self.held.x.shape[1:])
        x = prior_sample(self.model.sde, torch.empty(shape, device=self.device), noise)
        ts = grids.karras(self.model.sde, self.steps, t_end=0.01)
        return samplers.heun(score, self.model.sde, x, ts, churn=float(self.steps * self.churn), noise=noise)


@dataclass(frozen=True)
class Result:
    x: Tensor  # (classes, each, ...)
    right: float  # read as prompted by the independent classifier
    own: float  # by the CLIP that guided
    distance: float  # Frechet, to the held-out images
    calls: int
    seconds: float


@torch.no_grad()
def prompted(setup: Setup, rule: Rule | None, seed: int, bar: tqdm, distance: str = "softmax") -> Result:
    """`each` samples for every prompt under rule(score, E); None: no guidance."""
    score, tick = counted(setup.model), time.process_time()
    rows = []
    for c, prompt in enumerate(setup.prompts):
        guided = score if rule is None else rule(score, setup.energy({prompt: 1.0}, distance))
        rows.append(setup.run(guided, Streams(1000 * seed + c, setup.each)))
        bar.update(1)
    seconds, x = time.process_time() - tick, torch.cat(rows)
    y = torch.arange(len(rows)).repeat_interleave(setup.each)
    cosine = torch.stack([setup.energy({p: 1.0}, "cosine")(x) for p in setup.prompts], 1)
    own = float((cosine.argmin(1).cpu() == y).float().mean())
    far = setup.features.frechet(to_levels(x.cpu(), setup.held.levels), setup.held.x)
    return Result(torch.stack(rows), setup.judge.rate(x, y), own, far, score.calls // len(rows), seconds)


def exact(setup: Setup, scale: float = SCALE) -> Rule:
    return lambda score, E: guidance.energy(score, setup.model.sde, E, scale)


def cheap(setup: Setup, scale: float = 2 * SCALE) -> Rule:
    """Without the network's Jacobian, and without CLIP where it sees nothing or comes too late."""
    knobs: dict[str, Any] = {"through": False, "sigma_data": setup.model.sigma_data, "interval": ACTS}
    return lambda score, E: guidance.energy(score, setup.model.sde, E, scale, **knobs)


def bare(setup: Setup, scale: float) -> Rule:
    """The trap: x0' = x0 - scale sigma^2 grad E(x0): neither the network's Jacobian nor a stand-in."""
    return lambda score, E: guidance.mpgd(score, setup.model.sde, E, lambda r: scale * r**2)


def show(name: str, results: list[Result]) -> None:
    """A row of the table: mean over the seeds, and half the range."""

    def cell(values: list[float], digits: int) -> str:
        spread = (max(values) - min(values)) / 2
        return f"{sum(values) / len(values):.{digits}f} ± {spread:.{digits}f}"

    r = results
    print(
        f"{name:<34}{cell([k.right for k in r], 3):>16}{cell([k.own for k in r], 3):>16}"
        f"{cell([k.distance for k in r], 1):>14}{r[0].calls:>8}{sum(k.seconds for k in r) / len(r):>10.1f}"
    )


def mean(results: list[Result], field: str) -> float:
    return sum(getattr(r, field) for r in results) / len(results)


def accuracy(setup: Setup, seeds: list[int], out: Path, bar: tqdm) -> list[Claim]:
    """Unguided, guided, and guided the cheap way, seed by seed."""
    rules = {"unguided": None, "softmax, through the network": exact(setup), "softmax, the cheap way": cheap(setup)}
    found: dict[str, list[Result]] = {name: [] for name in rules}
    for seed in seeds:  # side by side, so that their times can be compared
        for name, rule in rules.items():
            found[name].append(prompted(setup, rule, seed, bar))
    for name, results in found.items():
        show(name, results)
    plain, full, fast = found.values()
    rows = [k[0].x[:, :n].transpose(0, 1).flatten(0, 1) for k, n in ((plain, 2), (full, 8))]
    picture(torch.cat(rows), out / "samples.png", columns=len(setup.prompts))
    return [
        Claim("CLIP-guided samples read as prompted", mean(full, "right"), ">=", 0.97),
        Claim("their Frechet distance - the unguided", mean(full, "distance") - mean(plain, "distance"), "<=", 10),
        Claim("network calls a sample", full[0].calls, "<=", 100),
        Claim("cheap way: accuracy lost", mean(full, "right") - mean(fast, "right"), "<=", 0.03),
        Claim("cheap way: time / time through the network", mean(fast, "seconds") / mean(full, "seconds"), "<=", 0.75),
    ]


def others(setup: Setup, seed: int, out: Path, bar: tqdm) -> None:
    """What else one may try, on a fifth of the samples."""
    few = replace(setup, each=max(2, setup.each // 5))
    still = replace(few, churn=False)
    sde = setup.model.sde
    rows = {
        "cosine, scale 10": (few, exact(few, 10.0), "cosine"),
        "cosine, scale 40": (few, exact(few, 40.0), "cosine"),
        "softmax, as long as the score": (few, lambda s, E: guidance.energy(s, sde, E, 0.3, normalize=True), "softmax"),
        "mpgd, rate 0.3": (few, lambda s, E: guidance.mpgd(s, sde, E, 0.3), "softmax"),
        "softmax, no re-noising": (still, exact(few), "softmax"),
        "trap: x0 - 10 sigma^2 grad E(x0)": (still, bare(few, 10.0), "cosine"),
    }
    pictures = []
    for name, (how, rule, distance) in rows.items():
        result = prompted(how, rule, seed, bar, distance)
        show(name, [result])
        pictures.append(result.x[:, 0])
    picture(torch.cat(pictures), out / "others.png", columns=len(setup.prompts))


def mixture(setup: Setup, seed: int, n: int, out: Path, bar: tqdm) -> list[Claim]:
    """{three: w, eight: 1 - w} at scale 2: the share of threes among both."""
    a, b = setup.prompts[3], setup.prompts[8]
    shares, rows = [], []
    for w in WEIGHTS:
        E = setup.energy({a: w, b: 1 - w})
        x = setup.run(guidance.energy(setup.model, setup.model.sde, E, 2.0), Streams(1000 * seed + 500, n))
        threes, eights = (setup.judge.rate(x, torch.full((n,), c)) for c in (3, 8))
        shares.append(threes / max(threes + eights, 1 / n))
        rows.append(x[:16])
        print(f"weight of three {w:.2f}: {threes:.3f} threes, {eights:.3f} eights")
        bar.update(1)
    picture(torch.cat(rows), out / "mixture.png", columns=min(16, n))
    rise = min(q - p for p, q in itertools.pairwise(shares))
    off = max(abs(p - w) for p, w in zip(shares, WEIGHTS, strict=True))
    return [
        Claim("weighted prompts: least rise of the share a quarter", rise, ">=", 0.1),
        Claim("weighted prompts: share - weight, largest", off, "<=", 0.1),
    ]


def gradients(setup: Setup, seed: int, out: Path) -> None:
    """Six samples noised to four levels: the estimate, and what guidance of scale 1 does to it."""
    prompt, noise = setup.prompts[5], Streams(1000 * seed + 600, 6)
    x0 = setup.run(setup.model, noise)
    for r in (3.0, 1.0, 0.5, 0.2):
        t = setup.model.sde.time(-torch.tensor(r, dtype=torch.float64).log())
        x = grids.perturb(setup.model.sde, x0, t, noise)
        file = out / f"gradient_{r:g}.png"
        guidance.gradient_picture(setup.model, setup.model.sde, setup.energy({prompt: 1.0}), x, t, file=file)


def main(argv: list[str] | None = None) -> list[Claim]:
    p = parser(__doc__, "clip_guidance")
    p.add_argument("--model", type=Path, metavar="FILE", help="a quickstart's model.safetensors; default: train (60 s)")
    p.add_argument("--clip", type=Path, metavar="DIR", help="a quickstart's clip folder; default: train (15 s)")
    p.set_defaults(data=None)
    args = p.parse_args(argv)
    device = start(args)
    began, size = time.process_time(), quickstart.QUICK if args.quick else quickstart.Size()
    data, held = load(None, args.seed)
    try:
        if args.model:
            model, header = load_model(args.model, device)
        else:
            model, header = quickstart.trained(data, args, size.train, device)
        if args.clip:
            clip = guidance.load_clip(str(args.clip), device=device)
        else:
            clip = quickstart.trained_clip(data, args, size.clip, device, header["data"])[0]
    except (ValueError, KeyError, OSError, RuntimeError) as err:
        p.error(str(err))
    if header.get("data", {}).get("seed") != args.seed:
        p.error(f"{args.model} was trained with another split of the digits; give its --seed")
    setup = Setup(model, clip, held, Judge(data), Features(data), device, *((2, 2) if args.quick else ()))
    seeds = [args.seed] if args.quick else [args.seed + k for k in range(3)]
    runs = 3 * len(seeds) * 10 + 6 * 10 + len(WEIGHTS)
    print(f"{'':<34}{'read as prompted':>16}{'by the CLIP':>16}{'Frechet':>14}{'calls':>8}{'seconds':>10}")
    with tqdm(total=runs, desc="sampling", unit="run") as bar:
        claims = accuracy(setup, seeds, args.out, bar)
        others(setup, args.seed, args.out, bar)
        claims += mixture(setup, args.seed, 8 if args.quick else 300, args.out, bar)
    gradients(setup, args.seed, args.out)
    claims.append(Claim("whole run, CPU seconds", time.process_time() - began, "<=", 300))
    report(claims, args.json)
    print(f"pictures in {args.out}")
    return claims


if __name__ == "__main__":
    main()
