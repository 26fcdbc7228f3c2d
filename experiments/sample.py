"""Samples from a saved model, by any sampler, guided as asked.

    python -m experiments.sample out/quickstart/model.safetensors --label 7 --w 2
    python -m experiments.sample out/quickstart/model.safetensors --sampler ddim --grid karras --steps 40

Writes OUT/samples.png and OUT/samples.npz (x, and levels where the model knows its data's).
Claims: sample i is the same alone and in any batch (largest difference <= 1e-4 in float32: the noise
is the same to the bit, the network's rounding is not), and `auto` makes as many network calls as asked.
"""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

import guidance
import samplers
from experiments.common import Claim, parser, picture, report, start
from experiments.digits import to_levels
from samplers import grids, hooks
from scoresde import Score, Streams, counted, prior_sample
from scoresde.checkpoint import load_model
from scoresde.files import whole

GRIDS = {"uniform": grids.uniform, "quadratic": grids.quadratic, "karras": grids.karras, "log_snr": grids.log_snr}


def main(argv: list[str] | None = None) -> list[Claim]:
    p = parser(__doc__, "sample")
    p.add_argument("model", type=Path, help="checkpoint written by training")
    p.add_argument("--n", type=int, default=60, help="how many (%(default)s)")
    p.add_argument("--batch", type=int, default=256, help="how many at once; changes nothing but memory (%(default)s)")
    names = ["auto", *sorted(samplers.SAMPLERS)]
    p.add_argument("--sampler", default="auto", choices=names, help="auto picks sampler and grid (%(default)s)")
    p.add_argument("--steps", type=int, default=20, help="solver steps; of auto, network calls (%(default)s)")
    p.add_argument("--tau", type=float, default=0.0, help="noise of auto: 0 the flow, 1 the SDE (%(default)s)")
    p.add_argument("--fitted", type=Path, help="grid or calibrated solver for auto, written by experiments.fit")
    p.add_argument("--grid", default="karras", choices=sorted(GRIDS), help="of the other samplers (%(default)s)")
    p.add_argument("--label", type=int, help="class; default: all of them in turn, or none")
    p.add_argument("--w", type=float, default=1.0, help="classifier-free guidance weight, 1 is off (%(default)s)")
    p.add_argument("--prompt", help="a text for CLIP guidance, with --clip")
    p.add_argument("--clip", help="folder or open_clip name of the CLIP that reads --prompt")
    p.add_argument("--scale", type=float, default=30.0, help="strength of CLIP guidance (%(default)s)")
    args = p.parse_args(argv)
    device = start(args)
    if args.n < 1 or args.batch < 1:
        p.error(f"--n and --batch must be at least 1, got {args.n} and {args.batch}")
    if (args.prompt is None) != (args.clip is None):
        p.error("--prompt and --clip go together")
    n = min(args.n, 20) if args.quick else args.n
    try:
        model, header = load_model(args.model, device)
        about = header.get("data")
        if about is None or not {"shape", "low", "high"} <= about.keys():
            p.error(
                f"{args.model} does not say the shape of its data; train it with extra={{'data': {{'shape': ...}}}}"
            )
        classes = model.classes or 0
        if args.label is not None:
            model.given(args.label)
        if args.sampler == "auto":
            fitted = None if args.fitted is None else samplers.load_fitted(args.fitted)
            sampler, ts = samplers.choose(model.sde, args.steps, d=model.sigma_data, tau=args.tau, fitted=fitted)
            if isinstance(fitted, samplers.Calibration):
                sampler = partial(sampler, model=f"{args.model.name}, w = {args.w:g}")
        else:
            sampler, ts = samplers.SAMPLERS[args.sampler], GRIDS[args.grid](model.sde, args.steps)
        if not classes and args.w != 1:
            p.error(f"--w {args.w:g} needs a model with classes; {args.model} has none")
        guidance.cfg(model, model, args.w)
        clip = None if args.clip is None else guidance.load_clip(args.clip, device=device)
    except (ValueError, OSError, RuntimeError) as err:
        p.error(str(err))
    labels = None
    if classes:
        labels = torch.arange(n) % classes if args.label is None else torch.full((n,), args.label)
    E = None
    if clip is not None:
        E = guidance.clip_energy(*clip, [args.prompt], low=about["low"], high=about["high"])
    calls = 0

    def run(rows: range, quiet: bool = False) -> Tensor:
        nonlocal calls
        score: Score = (
            model if labels is None else guidance.cfg(model.given(labels[rows.start : rows.stop]), model, args.w)
        )
        if E is not None:
            score = guidance.energy(score, model.sde, E, args.scale)
        score = counted(score)
        noise = Streams(args.seed, rows)
        x = prior_sample(model.sde, torch.empty(len(rows), *about["shape"], device=device), noise)
        on_step = (
            () if quiet else hooks.progress(len(ts) - 1, desc=f"samples {rows.start}..{rows.stop - 1}", leave=False)
        )
        x = sampler(score, model.sde, x, ts, noise=noise, on_step=on_step)
        calls = score.calls
        return x.cpu()

    starts = tqdm(range(0, n, args.batch), desc="batches", disable=n <= args.batch)
    try:
        x = torch.cat([run(range(i, min(i + args.batch, n))) for i in starts])
    except ValueError as err:  # a calibrated solver refuses another guidance
        p.error(str(err))
    nfe = calls
    arrays = {"x": x.numpy()}
    if "levels" in about:
        arrays["levels"] = to_levels(x, about["levels"]).numpy()
    if labels is not None:
        arrays["labels"] = labels.numpy()
    with whole(args.out / "samples.npz") as temporary:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
    columns = classes if classes and args.label is None else max(1, math.isqrt(n))
    picture(x, args.out / "samples.png", columns=columns, scale=6)
    print(f"{n} samples, {nfe} network calls each: {args.out / 'samples.png'}, {args.out / 'samples.npz'}")
    claims = [Claim("network calls", nfe, "<=", args.steps)] if args.sampler == "auto" else []
    alone = run(range(1), quiet=True)
    claims.append(Claim("sample 0 alone: largest difference", float((alone - x[:1]).abs().max()), "<=", 1e-4))
    report(claims, args.json)
    return claims


if __name__ == "__main__":
    main()
