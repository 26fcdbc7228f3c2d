"""What every experiment shares: its options, its claims, its pictures."""

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.files import whole


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """The options of every experiment; the script adds its own."""
    p = argparse.ArgumentParser(
        prog=f"python -m experiments.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="a smaller run, for tests: the figures are not the claims'")
    p.add_argument("--out", type=Path, default=Path("out") / name, metavar="DIR", help="where files go (%(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the claims as JSON rows")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="every random draw follows from it (%(default)s)")
    p.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda, mps (%(default)s)")
    p.add_argument(
        "--threads", type=int, default=1, metavar="N", help="CPU threads; more is slower when busy (%(default)s)"
    )
    return p


def start(args: argparse.Namespace) -> torch.device:
    """Threads, device and folder as asked; errors before any work."""
    if args.threads < 1:
        raise SystemExit(f"--threads must be at least 1, got {args.threads}")
    if args.seed < 0:
        raise SystemExit(f"--seed must be >= 0, got {args.seed}")
    torch.set_num_threads(args.threads)
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as err:
        raise SystemExit(f"--device {args.device} cannot be used here: {str(err).splitlines()[0]}") from err
    args.out.mkdir(parents=True, exist_ok=True)
    return device


@dataclass(frozen=True)
class Claim:
    """One measured figure against its goal; `sense` is "<=" or ">="."""

    claim: str
    value: float
    sense: str
    limit: float

    @property
    def holds(self) -> bool:
        return self.value <= self.limit if self.sense == "<=" else self.value >= self.limit

    def row(self) -> dict[str, Any]:
        return {"claim": self.claim, "value": self.value, "goal": f"{self.sense} {self.limit:g}", "holds": self.holds}


def report(claims: Sequence[Claim], path: Path | None) -> None:
    """Print the table; write it as JSON if asked."""
    width = max((len(c.claim) for c in claims), default=5)
    for c in claims:
        print(f"{c.claim:<{width}}  {c.value:10.4g}  {c.sense} {c.limit:<8g} {'holds' if c.holds else 'DOES NOT HOLD'}")
    if path is not None:
        with whole(path) as temporary:
            temporary.write_text(json.dumps([c.row() for c in claims], indent=2) + "\n")
        print(f"claims written to {path}")


def write_csv(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """A line a row, under the names of the first; the file is whole or not there."""
    with whole(file) as temporary, open(temporary, "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def picture(x: Tensor, file: Path, *, columns: int, scale: int = 6) -> str:
    """Images in [-1, 1], (N, 1 or 3, H, W), as one PNG grid, enlarged; returns the file's name."""
    from torchvision.utils import make_grid, save_image

    grid = make_grid((x.detach().cpu().float().clamp(-1, 1) + 1) / 2, nrow=columns, padding=1, pad_value=0.5)
    save_image(grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2), file)
    return file.name


def error_bar(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)
