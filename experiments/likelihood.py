"""Bits/dim of a saved model on a folder of images or an .npy / .npz, with its error bar.

    python -m experiments.likelihood out/quickstart/model.safetensors digits.npz

DATA: a folder of 8-bit images, an .npy of integer levels (N, H, W) or (N, 1, H, W), or an .npz with
such an array x and, if the model has classes, labels y.  Data are dequantised uniformly, with the
number of levels and the range the model was trained with; per-item values go to OUT/items.csv and
OUT/items.json.  Claims: the value beats the uniform density, log2(levels), and moves by <= 0.005
bits/dim when the solver's steps are doubled (looked at on the first batch).
"""

import argparse
import csv
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from experiments.common import Claim, error_bar, parser, report, start
from experiments.digits import read_folder
from scoresde import Model, Streams, bits_per_dim, dequantize, log_prob
from scoresde.checkpoint import load_model
from scoresde.files import whole


def read_data(path: Path, shape: list[int], levels: int) -> tuple[Tensor, Tensor | None]:
    """(integer levels (N, *shape), labels or None), or an error that says what is wrong with the file."""
    labels = None
    if path.is_dir():
        x = read_folder(path)
        if levels != 256:
            raise ValueError(f"images have 256 levels, this model was trained on {levels}; give an .npy of its levels")
    elif path.suffix in (".npy", ".npz") and path.is_file():
        try:
            loaded: Any = np.load(path, allow_pickle=False)
            arrays = {"x": loaded} if path.suffix == ".npy" else {k: loaded[k] for k in loaded.files}
        except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as err:
            raise ValueError(f"{path} is not a readable {path.suffix} file without objects ({err})") from err
        if "x" not in arrays or arrays["x"].dtype.kind not in "iufb":
            raise ValueError(f"{path} must hold an array of numbers named x, it holds {', '.join(arrays) or 'nothing'}")
        if arrays["x"].dtype.kind not in "iub" and not np.array_equal(arrays["x"], np.round(arrays["x"])):
            raise ValueError(
                f"{path}: x must be integer levels 0..{levels - 1}, got fractions of type {arrays['x'].dtype}; "
                "bits/dim is defined for quantised data, so undo the rescaling"
            )
        x = torch.from_numpy(arrays["x"].astype(np.int64))
        labels = torch.from_numpy(arrays["y"].astype(np.int64)) if "y" in arrays else None
        x = x[:, None] if x.ndim == len(shape) else x
    else:
        raise ValueError(f"{path} is neither a folder of images nor an .npy or .npz file")
    if list(x.shape[1:]) != shape:
        raise ValueError(
            f"{path} holds items of shape {list(x.shape[1:])}, this model was trained on {shape}; resize them"
        )
    if len(x) == 0:
        raise ValueError(f"{path} is empty")
    if int(x.min()) < 0 or int(x.max()) >= levels:
        raise ValueError(f"{path} has values {int(x.min())}..{int(x.max())}, this model's levels are 0..{levels - 1}")
    if labels is not None and labels.shape != (len(x),):
        raise ValueError(f"{path}: y has shape {tuple(labels.shape)} for {len(x)} items; give one label an item")
    return x, labels


def bits(model: Model, x: Tensor, rows: range, args: argparse.Namespace, about: dict[str, Any], steps: int) -> Tensor:
    """Bits/dim of each item; its dequantisation and probes come from its own stream."""
    noise = Streams(args.seed, rows)
    device = next(model.net.parameters()).device  # type: ignore[attr-defined]
    y = dequantize(x, about["levels"], about["low"], about["high"], noise).to(device)
    probes = args.probes or None
    lp = log_prob(model, model.sde, y, probes=probes, noise=noise, method="rk4", steps=steps)
    return bits_per_dim(lp, x[0].numel(), (about["high"] - about["low"]) / about["levels"]).cpu()


def main(argv: list[str] | None = None) -> list[Claim]:
    p = parser(__doc__, "likelihood")
    p.add_argument("model", type=Path, help="checkpoint written by training")
    p.add_argument("data", type=Path, help="folder of images, .npy or .npz")
    p.add_argument("--label", type=int, help="rate every item as this class")
    p.add_argument("--unconditional", action="store_true", help="leave the labels of the .npz aside")
    p.add_argument("--probes", type=int, default=1, help="Rademacher probes an item; 0: exact divergence (%(default)s)")
    p.add_argument("--steps", type=int, default=16, help="RK4 steps in log-noise, 4 network calls each (%(default)s)")
    p.add_argument("--batch", type=int, default=128, help="items at once (%(default)s)")
    args = p.parse_args(argv)
    device = start(args)
    if args.steps < 1 or args.batch < 1 or args.probes < 0:
        p.error("--steps and --batch must be at least 1, --probes at least 0")
    try:
        model, header = load_model(args.model, device)
        about = header.get("data")
        if about is None or not {"shape", "levels", "low", "high"} <= about.keys():
            p.error(
                f"{args.model} does not say the shape, levels and range of its data; train with extra={{'data': ...}}"
            )
        x, labels = read_data(args.data, about["shape"], about["levels"])
        if args.quick:
            x, labels = x[:16], None if labels is None else labels[:16]
        if args.unconditional:
            labels = None
        if args.label is not None:
            labels = torch.full((len(x),), args.label)
        if labels is None and not args.unconditional and model.classes:
            print("no labels given: rating without a class")
        elif labels is not None:
            model.given(labels)  # checked before any work
    except (ValueError, OSError) as err:
        p.error(str(err))
    values: list[Tensor] = []
    bar = tqdm(total=len(x), unit="item", desc="rating")
    for i in range(0, len(x), args.batch):
        rows = range(i, min(i + args.batch, len(x)))
        here = model if labels is None else model.given(labels[rows.start : rows.stop])
        values.append(bits(here, x[rows.start : rows.stop], rows, args, about, args.steps))
        bar.update(len(rows))
        if bar.n > 1:
            bar.set_postfix_str("{:.3f} ± {:.3f} bits/dim".format(*error_bar(torch.cat(values))))
    bar.close()
    value = torch.cat(values)
    mean, error = error_bar(value) if len(value) > 1 else (float(value), math.nan)
    first = range(min(args.batch, len(x)))
    here = model if labels is None else model.given(labels[: len(first)])
    moved = float((bits(here, x[: len(first)], first, args, about, 2 * args.steps) - value[: len(first)]).mean())
    given = "no label" if labels is None else "their labels" if args.label is None else f"label {args.label}"
    uniform = math.log2(about["levels"])
    print(
        f"{mean:.4f} ± {error:.4f} (one standard error) bits/dim, {len(x)} items given {given}; uniform {uniform:.4f}"
    )
    items = [{"item": i, "bits_per_dim": float(v)} for i, v in enumerate(value)]
    with whole(args.out / "items.json") as temporary:
        temporary.write_text(json.dumps(items, indent=1) + "\n")
    with whole(args.out / "items.csv") as temporary, open(temporary, "w", newline="") as f:
        writer = csv.DictWriter(f, ["item", "bits_per_dim"])
        writer.writeheader()
        writer.writerows(items)
    print(f"per item: {args.out / 'items.csv'}, {args.out / 'items.json'}")
    claims = [
        Claim("bits/dim", mean, "<=", math.log2(about["levels"])),
        Claim("bits/dim: change when the steps are doubled", abs(moved), "<=", 0.005),
    ]
    report(claims, args.json)
    return claims


if __name__ == "__main__":
    main()
