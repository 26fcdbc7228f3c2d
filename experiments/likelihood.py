"""Bits/dim of a saved model on a folder of images or an .npy / .npz, with everything that makes it uncertain.

    python -m experiments.likelihood out/quickstart/model.safetensors digits.npz
    torchrun --nproc-per-node 4 -m experiments.likelihood out/quickstart/model.safetensors digits.npz

DATA: a folder of 8-bit images, an .npy of integer levels (N, H, W) or (N, 1, H, W), or an .npz with such an array x
and, if the model has classes, labels y.  Levels and range are those the model was trained with.

Prints and saves a report: the code length by the ODE, its refined value, what test items, dequantisation, probes and
solver add to the error, a data-fitted prior beside the SDE's, the variational bound and the I-MMSE estimate.  Per-item
values go to OUT/items.csv and OUT/items.json, the report to OUT/report.json.

A killed run goes on where it was and ends with the same bits: each batch is a file under OUT/parts, in a folder named
by a hash of weights, data, options and code.  With any number of processes the numbers are the same.  --half-width
looks at whole batches, in the order of a permutation drawn from the seed, from 30 items on.

Claims: the value beats the uniform density, log2(levels), and moves by <= 0.005 bits/dim when the solver is refined
(twice the steps or half the tolerance).  To expect of the quickstart's model on its 364 held-out digits, half a minute:
1.77 +- 0.012, of which items 0.010, dequantisation 0.004, probes 0.0003; solver 0.001; VLB 0.07 above.
"""

import argparse
import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from experiments.common import Claim, parser, report, start, write_csv
from experiments.digits import read_folder
from experiments.rating import DEQUANTIZERS, How, Part, Task, prepare, rated
from scoresde.checkpoint import load_model
from scoresde.files import whole
from scoresde.likelihood import CURVE, METHODS, MULTISTEP
from scoresde.report import Report, Row, estimate, means, parts, solver_doubt, split

UNIT, REFINED = "bits/dim", "ODE, refined"


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


def main(argv: list[str] | None = None) -> list[Claim]:
    p = parser(__doc__, "likelihood")
    p.add_argument("model", type=Path, help="checkpoint written by training")
    p.add_argument("data", type=Path, help="folder of images, .npy or .npz")
    p.add_argument("--label", type=int, help="rate every item as this class")
    p.add_argument("--unconditional", action="store_true", help="leave the labels of the .npz aside")
    p.add_argument("--limit", type=int, metavar="N", help="rate N items, drawn from the seed")
    p.add_argument("--half-width", type=float, metavar="H",
                   help="stop when the 95 %% interval is +- H bits/dim (the solver apart)")  # fmt: skip
    p.add_argument("--batch", type=int, default=64, help="items at once, and in a part file (%(default)s)")
    p.add_argument("--method", choices=[m for m in METHODS if m != CURVE], default=MULTISTEP, metavar="M",
                   help="of scoresde.change: multistep, apart, dopri5, rk4, ... (%(default)s)")  # fmt: skip
    size = p.add_mutually_exclusive_group()
    size.add_argument("--steps", type=int, default=32, help="of multistep, and of fixed-step methods (%(default)s)")
    size.add_argument("--tol", type=float, default=1e-3, help="of adaptive methods, nats/dim (%(default)s)")
    p.add_argument("--probes", type=int, default=4, help="Hadamard probes a node; 0: exact trace (%(default)s)")
    p.add_argument("--dequantize", choices=DEQUANTIZERS, default="uniform", help="(%(default)s)")
    p.add_argument("--importance", type=int, default=1, metavar="K", help="importance-weighted draws (%(default)s)")
    p.add_argument("--repeats", type=int, default=64, metavar="N",
                   help="items that are rated again, for the split and the solver (%(default)s)")  # fmt: skip
    p.add_argument("--bound-calls", type=int, default=64, metavar="N",
                   help="network calls an item for each bound; 0: no bounds (%(default)s)")  # fmt: skip
    args = p.parse_args(argv)
    rank, world = (int(os.environ.get(name, d)) for name, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if args.device == "cuda" and world > 1:
        args.device = f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % max(1, torch.cuda.device_count())}"
    device = start(args)
    _check(p, args)
    try:
        model, header = load_model(args.model, device)
        about = header.get("data")
        if about is None or not {"shape", "levels", "low", "high"} <= about.keys():
            p.error(
                f"{args.model} does not say the shape, levels and range of its data; train with extra={{'data': ...}}"
            )
        x, labels = read_data(args.data, about["shape"], about["levels"])
        if args.unconditional or model.classes is None:
            labels = None
        if args.label is not None:
            labels = torch.full((len(x),), args.label)
        if labels is not None:
            model.given(labels)  # checked before any work
    except (ValueError, OSError) as err:
        p.error(str(err))
    if labels is None and not args.unconditional and model.classes and rank == 0:
        print("no labels given: rating without a class")
    how = How(args.method, args.tol, args.steps, args.probes, args.dequantize, args.importance, args.bound_calls,
              args.repeats, args.batch, args.seed)  # fmt: skip
    limit = 16 if args.quick and args.limit is None else args.limit
    work = prepare(model, x, labels, (about["levels"], about["low"], about["high"]), how, args.out, limit)
    with tqdm(total=len(work.order), unit="item", desc="rating", disable=rank > 0) as bar:

        def show(value: Tensor) -> None:
            bar.update(len(value) - bar.n)
            if len(value) > 1:
                mean = estimate(value)
                bar.set_postfix_str(f"{mean.value:.4f} ± {mean.half_width:.4f} bits/dim (95 %)")

        ready = rated(work, args.half_width, rank, world, show)
    if ready is None:
        return []
    given = "no label" if labels is None else "their labels" if args.label is None else f"label {args.label}"
    found, items = summary(work, ready, given)
    with whole(args.out / "items.json") as temporary:
        temporary.write_text(json.dumps(items, indent=1) + "\n")
    write_csv(items, args.out / "items.csv")
    found.save(args.out / "report.json")
    print(f"{found.table()}\n\n{found}")
    print(f"per item: {args.out / 'items.csv'}, {args.out / 'items.json'}; report: {args.out / 'report.json'}")
    claims = [Claim("bits/dim", found["ODE"].value, "<=", math.log2(about["levels"]))]
    if any(row.name == REFINED for row in found.rows):
        moved = found[REFINED].value - found["ODE"].value
        claims.append(Claim("bits/dim: change when the solver is refined", abs(moved), "<=", 0.005))
    report(claims, args.json)
    return claims


def summary(task: Task, ready: list[Part], given: str) -> tuple[Report, list[dict[str, float]]]:
    """The report, and a row for each rated item, in the order of the data."""
    how = task.how
    n = sum(len(part["value"]) for part in ready)
    rows, order = torch.sort(task.order[:n])
    repeated = ("repeats", "coarse", "fine", "lift")
    got = {
        name: torch.cat([part[name] for part in ready if name in part])[slice(None) if name in repeated else order]
        for name in ready[0]
    }
    value, fitted = got["value"], got["fitted"]
    m = len(got.get("repeats", ()))
    doubt = between = None
    if m > 1:
        own, other = got["coarse"].T, got["fine"].T
        doubt, between = solver_doubt(own[0], other[0]), solver_doubt(own[0] - own[1], other[0] - other[1])
    out = [means("ODE", value, UNIT, f"{n} items given {given}; {how}", doubt)]
    if m > 1 and doubt is not None:
        moved = estimate(got["fine"][:, 0] - got["coarse"][:, 0])
        finer = "half the tolerance" if how.by_tolerance else "twice the steps"
        note = f"{finer}: {moved.value:+.1e} ± {moved.error:.1e} on {m} items"
        out.append(Row(REFINED, out[0].value + moved.value, out[0].error, UNIT, note, doubt / 2, out[0].dof))
        out += parts(split(got["repeats"]), n, UNIT)
    if "lift" in got:
        out.append(means("lift by trace noise, at most", got["lift"], UNIT, "of the importance-weighted value"))
    note = f"N(mean, covariance) of the {len(task.x)} items in the data"
    out.append(means("ODE, data-fitted prior", fitted, UNIT, note, doubt))
    out.append(means("prior mismatch", value - fitted, UNIT, "own prior - fitted one", between))
    columns = {"bits_per_dim": value, "fitted_prior": fitted}
    if "immse" in got:
        terms = {name: got[f"vlb_{name}"] for name in ("prior", "diffusion", "reconstruction")}
        vlb, immse = torch.stack(list(terms.values())).sum(0), got["immse"]
        columns |= {"vlb": vlb, "immse": immse, "vlb_discrete": got["discrete"]}
        out.append(means("VLB", vlb, UNIT, "variational bound, of the first dequantisation draw"))
        out += [means(f"VLB: {name}", term, UNIT) for name, term in terms.items()]
        out.append(means("VLB - ODE", vlb - value, UNIT, "item by item", doubt))
        out.append(
            means("I-MMSE", immse, UNIT, "of the same draw; what lies beyond the noise range is not known", None)
        )
        out.append(means("I-MMSE - ODE", immse - value, UNIT, "item by item", None))
        note = "of the levels at their bins' centres: loose for a model of dequantised data"
        out.append(means("VLB, discrete", got["discrete"], UNIT, note))
    levels = task.grid[0]
    out.append(Row("uniform over the levels", math.log2(levels), 0.0, UNIT, f"{levels} levels", 0.0))
    items = [
        {"item": int(i), **{name: float(v[j]) for name, v in columns.items()}} for j, i in enumerate(rows.tolist())
    ]
    return Report(tuple(out)), items


def _check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    least = {"batch": 1, "steps": 2 if args.method == MULTISTEP else 1, "importance": 1, "probes": 0, "repeats": 0}
    for name, low in least.items():
        if getattr(args, name) < low:
            p.error(f"--{name} must be at least {low}, got {getattr(args, name)}")
    if args.limit is not None and args.limit < 1:
        p.error(f"--limit must be at least 1 item, got {args.limit}")
    if not 0 < args.tol < 1:
        p.error(f"--tol must lie in (0, 1), got {args.tol}")
    if args.bound_calls and (args.bound_calls < 4 or args.bound_calls % 2):
        p.error(f"--bound-calls must be even and at least 4, or 0 for no bounds; got {args.bound_calls}")
    if args.half_width is not None and not args.half_width > 0:
        p.error(f"--half-width must be positive, got {args.half_width}")


if __name__ == "__main__":
    main()
