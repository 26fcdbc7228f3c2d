"""The main job: train on real handwritten digits, then sample, guide, rate and show, on one page.

Claims (one CPU thread; the figures of this run stand on the page and in --json):
    a class-conditional score network trains in 60 s; its samples are read as the asked digit in
    >= 0.975 of cases (w = 1) and >= 0.995 (w = 1.5) by a classifier trained on real digits;
    held-out bits/dim <= 1.80, converged and dequantised; Bayes' rule over the class likelihoods is
    right for >= 0.95 of held-out digits; a CLIP trained in 15 s is right for >= 0.95 zero-shot and
    steers the unconditional model to >= 0.90; classifier-free guidance (class) and CLIP (stroke)
    compose on one score: accuracy >= 0.98, ink apart by >= 1.0.

To expect with seed 0 (the budget is time, so a run differs a little): accuracy 0.98 and 0.999;
1.77 to 1.80 bits/dim (uniform 4.09, Gaussian mixture 2.70, independent pixels 2.44; two Euler steps
would print 0.04, bin centres 1.27); Bayes' rule 0.98; CLIP 0.96 zero-shot, 0.97 as a guide; composed
1.00, ink 1.7 apart; 3 minutes in all.

Writes OUT/index.html with its pictures beside it, OUT/model.safetensors and OUT/clip/.  A second run
reuses the trained files.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import guidance
from experiments import digits_clip, sections
from experiments.common import Claim, parser, report, start
from experiments.digits import Images, Judge, load
from experiments.page import write_page
from scoresde import EDM, Model
from scoresde.checkpoint import load_model, read
from scoresde.nets import UNet
from scoresde.train import train

SDE = EDM(T=20.0, t_min=0.005)  # noise 20 against data of 0.7: nothing is left; a tenth of a bin at the end


@dataclass(frozen=True)
class Size:
    """How much of each thing is done."""

    train: float = 59.5  # seconds; the last step and the file belong to the claim's 60
    clip: float = 14.8
    samples: int = 1000  # where a claim is made
    sweep: int = 300
    guided: int = 24  # a class
    rated: int = 10_000  # held-out images for bits/dim
    classified: int = 150
    steps: int = 8  # a third of the network calls for a likelihood
    heun: int = 14
    mixtures: tuple[int, ...] = (5, 10, 20)  # components of the yardstick


QUICK = Size(6, 4, samples=50, sweep=20, guided=2, rated=20, classified=10, steps=4, heun=6, mixtures=(3,))


def trained(
    data: Images, args: argparse.Namespace, seconds: float, device: torch.device
) -> tuple[Model, dict[str, Any]]:
    """The score model, from its file if it is there, and the file's header."""
    path = args.out / "model.safetensors"
    about = {"folder": str(args.data) if args.data else "scikit-learn digits", "seed": args.seed,
             "shape": list(data.x.shape[1:]), "levels": data.levels, "low": -1.0, "high": 1.0,
             "names": list(data.names)}  # fmt: skip
    if path.exists():
        header = read(path, "none")[1]
        if header.get("data") != about:
            raise SystemExit(
                f"{path} was trained on other data or with another seed ({header.get('data')}); give another --out"
            )
        if header["seconds"] >= seconds:
            print(f"reusing {path} ({header['step']} steps, {header['seconds']:.0f} s)")
            return load_model(path, device)[0], header
    torch.manual_seed(args.seed)
    size = data.x.shape[-1]
    mults = (1, 2) if size <= 16 else (1, 2, 2) if size <= 32 else (1, 2, 2, 4)
    net = UNet(channels=1, width=16, mults=mults, classes=len(data.names)).to(device)
    sigma_data = float(data.densities().std())
    model = Model(net, SDE, "F", sigma_data=sigma_data, classes=len(data.names))

    def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(len(data), (n,))
        return data.densities(rows), data.y[rows]

    train(model, batch, seconds=seconds, batch_size=64, seed=args.seed, path=path, extra={"data": about})
    return load_model(path, device)[0], read(path, "none")[1]


def trained_clip(
    data: Images, args: argparse.Namespace, seconds: float, device: torch.device, about: dict[str, Any]
) -> tuple[tuple[Any, Any], float]:
    """CLIP and its tokenizer, from the folder if it was trained on this for as long; and the seconds it took."""
    folder = args.out / "clip"
    record = folder / "training.json"
    known = json.loads(record.read_text()) if record.exists() else {"seconds": 0}
    if {**about, "seconds": known["seconds"]} == known and known["seconds"] >= seconds:
        print(f"reusing {folder} ({known['seconds']:.0f} s)")
    else:
        record.unlink(missing_ok=True)
        digits_clip.train_clip(data, folder, seconds=seconds, seed=args.seed, about=about)
        known = json.loads(record.read_text())
    return guidance.load_clip(str(folder), device=device), known["seconds"]


def main(argv: list[str] | None = None) -> list[Claim]:
    p = parser(__doc__, "quickstart")
    p.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with one sub-folder of grey images a class; default: the digits",
    )
    p.add_argument(
        "--budget", type=float, metavar="S", help="seconds of training of the score network (60; with --quick 6)"
    )
    p.add_argument("--clip-budget", type=float, metavar="S", help="seconds of training of CLIP (15; with --quick 4)")
    args = p.parse_args(argv)
    device = start(args)
    size = QUICK if args.quick else Size()
    began = time.perf_counter()
    try:
        data, held = load(args.data, args.seed)
    except ValueError as err:
        raise SystemExit(f"--data: {err}") from err
    judge = Judge(data)
    model, header = trained(data, args, args.budget or size.train, device)
    clip, clip_seconds = trained_clip(data, args, args.clip_budget or size.clip, device, header["data"])

    run = sections.Run(model, SDE, data, held, judge, clip, size, args.out, args.seed, device)
    parts, claims = [], [Claim("score network: seconds of training", header["seconds"], "<=", 60)]
    for section in (
        sections.headline, sections.by_sampler, sections.guidance_sweep, sections.by_prompt, sections.likelihood,
        sections.by_likelihood, sections.inpainting, sections.image_to_image, sections.denoising,
    ):  # fmt: skip
        tick = time.perf_counter()
        part, more = section(run)
        part["seconds"] = time.perf_counter() - tick
        print(f"{part['title']}: {part['seconds']:.1f} s", flush=True)
        parts.append(part)
        claims += more
    right, _ = digits_clip.zero_shot(*clip, held)
    claims += [
        Claim("CLIP: seconds of training", clip_seconds, "<=", 15),
        Claim("CLIP: zero-shot accuracy", right, ">=", 0.95),
    ]
    total = time.perf_counter() - began
    claims.append(Claim("whole run, seconds", total, "<=", 240))
    facts = {"steps": header["step"], "seconds": header["seconds"], "total": total, "data": header["data"]["folder"],
             "train": len(data), "held": len(held), "judge": judge.rate_levels(held.x, held.y),
             "parameters": sum(v.numel() for v in model.net.parameters())}  # type: ignore[attr-defined]  # fmt: skip
    page = write_page(args.out / "index.html", parts, claims, facts)
    report(claims, args.json)
    print(f"open {page}")
    return claims


if __name__ == "__main__":
    main()
