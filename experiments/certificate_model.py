"""Classifier-free guidance of a trained network, certified: `experiments.certificate --model FILE`.

The network's own densities are the yardstick: p(x) and p(x|c) are those of its two flows, the target is
pi = p(x)^(1-w) p(x|c)^w / Z, and q is the density of the guided flow.  So the certificate says what guidance does to
this model, not how good the model is.  Z is known at w = 1 only, where q = pi = p(x|c): what the table then says of
KL and log Z is the solver's error.  At other w the KL is with the Z that the samples estimate, which makes it in
expectation too small (Jensen): where the tail index is above 1/2 read it as a lower bound.
Claims:
    w = 1 is exact: KL <= 0.05 nats, |log Z| <= 0.2 nats
    KL grows with w

To expect of the quickstart's model, class 0, 240 samples, 160 s: w = 1, 1.5, 2, 4: KL 0.0006, 0.60, 1.3, 6.0 nats;
effective samples 240, 49, 21, 2; tail -0.2, 0.6, 0.9, 1.9; -log q -54.5, -58, -60, -66 nats (guidance narrows); solver
and probes leave 0.04 to 0.2 nats in log w.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import guidance
from experiments.common import Claim, picture, write_csv
from scoresde import Model, Streams, log_prob, prior_sample
from scoresde.checkpoint import load_model

WEIGHTS = (1.0, 1.5, 2.0, 4.0)
STEPS, PROBES, AGAIN = 40, 8, 6


def certified(
    model: Model, label: int, w: float, x_T: Tensor, *, seed: int, steps: int, probes: int | None
) -> guidance.Certificate:
    """n samples of the guided flow from x_T with log q and log w; probes: None for exact divergences."""
    how: dict[str, Any] = {"method": "multistep", "steps": steps, "d": model.sigma_data, "probes": probes, "chunk": 4,
                           "noise": Streams(seed, len(x_T))}  # fmt: skip
    cond, sde = model.given(label), model.sde

    def log_tilted(x: Tensor) -> Tensor:
        log_c = log_prob(cond, sde, x, **how).double()
        return log_c if w == 1 else (1 - w) * log_prob(model, sde, x, **how).double() + w * log_c

    return guidance.certify(guidance.cfg(cond, model, w), sde, x_T, log_tilted, **how)


def table(
    model: Model, label: int, weights: Sequence[float], x_T: Tensor, *, seed: int, steps: int, probes: int, again: int
) -> tuple[list[dict[str, float]], dict[float, Tensor]]:
    """A row and the samples for each weight.

    left: RMS of what solver and probes leave in log w, nats, by the first `again` samples once more with twice the
          steps and exact divergences.  Normal noise of that size raises KL by left^2/2
    """
    rows, drawn = [], {}
    for w in tqdm(weights, desc="certifying"):
        got = certified(model, label, w, x_T, seed=seed, steps=steps, probes=probes)
        fine = certified(model, label, w, x_T[:again], seed=seed, steps=2 * steps, probes=None)
        left = (got.log_w[:again] - fine.log_w).square().mean().sqrt()
        rows.append(
            {"w": w, "KL, own Z": got.kl, "error": got.kl_error, "log Z": got.log_z, "ESS/n": got.ess / len(x_T),
             "tail": got.tail, "-log q": -float(got.log_q.mean()), "left": float(left)}
        )  # fmt: skip
        drawn[w] = got.x.cpu()
    return rows, drawn


def run(file: Path, label: int, n: int, out: Path, seed: int, device: torch.device, quick: bool = False) -> list[Claim]:
    """The table, printed and in OUT/certificate.csv; the picture; the claims.  ValueError, OSError of a bad file."""
    model, header = load_model(file, device)
    about = header.get("data")
    if about is None or "shape" not in about:
        raise ValueError(f"{file} does not say the shape of its data; train it with extra={{'data': {{'shape': ...}}}}")
    if not model.classes:
        raise ValueError(f"{file} has no classes, so no classifier-free guidance; train one with classes")
    if not 0 <= label < model.classes:
        raise ValueError(f"--label must lie in 0..{model.classes - 1}, got {label}")
    weights = WEIGHTS[::2] if quick else WEIGHTS
    n, again, steps, probes = (min(n, 16), 2, 16, 4) if quick else (n, min(n, AGAIN), STEPS, PROBES)
    x_T = prior_sample(model.sde, torch.empty(n, *about["shape"], device=device), Streams(seed, n))
    rows, drawn = table(model, label, weights, x_T, seed=seed + 1, steps=steps, probes=probes, again=again)
    print("\n" + "  ".join(f"{k:>9}" for k in rows[0]))
    for row in rows:
        print("  ".join(f"{v:9.3g}" for v in row.values()))
    write_csv(rows, out / "certificate.csv")
    print(f"\ntable: {out / 'certificate.csv'}")
    if len(about["shape"]) == 3 and about["shape"][0] in (1, 3):
        few = min(n, 16)
        picture(torch.cat([x[:few] for x in drawn.values()]), out / "certificate.png", columns=few)
        print(f"picture: {out / 'certificate.png'}, a row for each of w = {', '.join(f'{w:g}' for w in weights)}")
    kl = [row["KL, own Z"] for row in rows]
    return [
        Claim("w = 1: KL, nats", abs(kl[0]), "<=", 0.05),
        Claim("w = 1: |log Z|, which is 0, nats", abs(rows[0]["log Z"]), "<=", 0.2),
        Claim("KL grows with w: least rise, nats", min(b - a for a, b in itertools.pairwise(kl)), ">=", 0),
    ]
