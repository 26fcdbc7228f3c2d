"""Numbers computed by other people's programs, and how ours are laid beside them.

A case is `<group>/<id>.json` (formulas, settings, tolerance, origin) with `<id>.npz` (arrays: `in_*` given, `out_*`
expected).  A few travel with the repository in `tests/data`; the rest lie beside the checkout, in
`../shared/reference/cases`, and a test whose case is in neither place is skipped.
`Case.check` is the cases' own rule, |x - ref| <= atol + rtol max|ref|.

Every case is named by a test or by this table (`test_reference_sde.py` checks it).

    case                                reason it is left out
    diffusers/golden_ddim               clips x0 and keeps the old eps: no score does that; so the three below
    diffusers/golden_ddim_alpha_one
    diffusers/golden_ddim_v
    diffusers/golden_ddim_inverse       also runs upwards in noise
    diffusers/mix_ddim_inverse_10       runs upwards in noise, model told the end of the step; samplers only go down
    kdiff/fid_kid                       distances of distributions: not in the library yet
    gd/ddim_reverse_25                  runs upwards in noise

Left out within a case:
    gd/one_step              learned variances; the large variance of i = 0, borrowed from i = 1; conditioned_mean
    gd/bound                 learned variances; the mse and xstart_mse columns
    gd/training_losses       terms with a variational bound; PREVIOUS_X
    kdiff/discrete_wrapper   values between labels: they interpolate log sigma, we log alpha_bar
    diffusers/mix_pndm_skip_10   the state inside the first step; a last call whose step goes nowhere
    ssde/ode_*, likelihood_* the default runs, which carry RK45's error of 1e-4
    tde/flow_*               unpinned_*: our flow always lands on the end
    edm/ablation_*           churned Heun in the path's own time; with sigma = t, scale 1 it is ours
    guidance/linear_inverse_*, posterior_rules   jfps (its step), not built
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scoresde import SDE, VE, VP, Mixture, Noise, Score, SubVP, convert, mixture
from scoresde.types import like

HERE = Path(__file__).resolve().parent
FOLDERS = (HERE / "data", HERE.parent.parent / "shared" / "reference" / "cases")
F64 = torch.float64


@dataclass(frozen=True, eq=False)
class Case:
    """One case: `case["in_x"]` is an array as a tensor, `case.params` the settings."""

    name: str
    params: dict[str, Any]
    rtol: float
    atol: float
    arrays: dict[str, Tensor]

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def sde(self) -> SDE:
        return sde_of(self.params["sde"])

    def target(
        self, prefix: str = "in_gm", shape: Iterable[int] | None = None, labels: Tensor | None = None
    ) -> Mixture:
        """The model of the case: a mixture of diagonal Gaussians."""
        means, var = self[f"{prefix}_means"], self[f"{prefix}_vars"]
        to = (len(means), *(means.shape[1:] if shape is None else shape))
        return mixture(self[f"{prefix}_weights"], means.reshape(to), var=var.reshape(to), labels=labels)

    def check(self, got: Tensor, key: str, rtol: float | None = None, atol: float | None = None) -> None:
        """`got` is the array `key` within the case's tolerance, or the one given (the caller says why)."""
        ref = self[key]
        assert got.shape == ref.shape, f"{self.name} {key}: shape {tuple(got.shape)}, not {tuple(ref.shape)}"
        error, size = float((got - ref).abs().max()), float(ref.abs().max())
        bound = (self.atol if atol is None else atol) + (self.rtol if rtol is None else rtol) * size
        assert error <= bound, f"{self.name} {key}: off by {error:.3g}, allowed {bound:.3g}, largest value {size:.3g}"


def load(name: str) -> Case:
    """The case `<group>/<id>`; skips the test if it is not here."""
    for folder in FOLDERS:
        path = folder / f"{name}.json"
        if path.exists():
            about = json.loads(path.read_text())
            with np.load(path.with_suffix(".npz")) as z:
                arrays = {k: torch.from_numpy(z[k].copy()) for k in z.files}
            return Case(name, about["params"], about["tolerance"]["rtol"], about["tolerance"]["atol"], arrays)
    pytest.skip(f"{name} is not in tests/data, and the reference numbers are not beside the checkout")


def sde_of(params: dict[str, Any]) -> SDE:
    if params["type"] == "ve":
        return VE(params["sigma_min"], params["sigma_max"])
    return {"vp": VP, "subvp": SubVP}[params["type"]](params["beta_min"], params["beta_max"])


def toy(x: Tensor, c: Tensor) -> Tensor:
    """The peers' test network, 0.3 x + 0.5 sin(2 x + c)."""
    return 0.3 * x + 0.5 * torch.sin(2 * x + like(c, x))


def recorded(z: Iterable[Tensor]) -> Noise:
    """Noise that returns the recorded draws in order."""
    draws = iter(z)
    return lambda x: next(draws)


def seen(score: Score) -> tuple[Score, list[Tensor], list[Tensor]]:
    """The score, and what it was asked: states and times."""
    xs, times = [], []

    def asked(x: Tensor, t: Tensor) -> Tensor:
        xs.append(x.clone())
        times.append(t)
        return score(x, t)

    return asked, xs, times


class Elsewhere:
    """`sde` read at times[i] where the sampler says ts[i]: for peers that evaluate elsewhere than they step."""

    def __init__(self, sde: SDE, ts: Tensor, times: Tensor) -> None:
        self.sde, self.ts, self.times = sde, ts, times

    def time_of(self, t: Tensor) -> Tensor:
        same = self.ts == t[..., None]
        assert bool(same.any(-1).all()), "asked for a time off the grid"
        return self.times[same.int().argmax(-1)]

    def score(self, score: Score) -> Score:
        return lambda x, t: score(x, self.time_of(t))

    def __getattr__(self, name: str) -> Any:
        """T, and alpha, sigma, drift, diffusion, lam at the other time."""
        member = getattr(self.sde, name)
        return (lambda t: member(self.time_of(t))) if callable(member) else member


@dataclass(frozen=True, eq=False)
class Levels:
    """An "SDE" that is a list of noise levels: at t = i, alpha = a[i] and sigma = s[i]."""

    a: Tensor
    s: Tensor

    def alpha(self, t: Tensor) -> Tensor:
        return self.a[t.long()]

    def sigma(self, t: Tensor) -> Tensor:
        return self.s[t.long()]

    def lam(self, t: Tensor) -> Tensor:
        return torch.log(self.alpha(t) / self.sigma(t))

    @property
    def T(self) -> float:
        return float(len(self.a) - 1)


@dataclass(frozen=True)
class Ratio:
    """A variance-preserving path whose time is r = sigma/alpha: alpha = 1/sqrt(1 + t^2), sigma = alpha t."""

    T: float = 1e6

    def alpha(self, t: Tensor) -> Tensor:
        return (1 + t**2).rsqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return self.alpha(t) * t

    def lam(self, t: Tensor) -> Tensor:
        return -torch.log(t)

    def time(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam)


def told(case: Case, sde: Any, kind: str = "eps", clip: float | None = None) -> Score:
    """diffusers' own test network, prediction = x c/(c + 1) with c the label it records for each call.

    clip: x0 is cut to +-clip and divided by it.  (Their dynamic threshold is at least 1 and then at most this, so never
    dynamic.)
    """
    labels = iter(case["in_eval_t"])

    def score(x: Tensor, t: Tensor) -> Tensor:
        label = next(labels)
        out = x * label / (label + 1)
        if clip is None:
            return convert(out, x, t, sde, kind, "score")
        x0 = convert(out, x, t, sde, kind, "x0").clamp(-clip, clip) / clip
        return convert(x0, x, t, sde, "x0", "score")

    return score


def moments(run: Callable[[Tensor, Noise], Tensor], D: int, std: float, draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and variance without the last draw of run(x, noise), affine in each, for x ~ N(0, std^2 I).

    One batch: a row of zeros, a row with the start at std, and for each draw a row where that draw alone is 1.
    """
    x = torch.zeros(draws + 2, D, dtype=F64)
    x[1] = std
    count = iter(range(2, draws + 2))

    def noise(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        z[next(count)] = 1
        return z

    y = run(x, noise)
    parts = (y[1:] - y[0]) ** 2
    return y[0], parts.sum(0), parts[:-1].sum(0)
