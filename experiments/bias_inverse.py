"""Posterior samplers on half a digit, each as it is published: what `experiments.bias_card` runs.

A method is a function (case, problem, n, seed) -> (samples of x0, network calls a sample).  120 steps of the published
sampler where the paper has no number of its own, as in `experiments.posteriors` for the library's default.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import guidance
from experiments import posteriors
from experiments.posteriors import Case, average, rate
from experiments.problems import Problem, problem
from guidance.operators import spectral
from samplers import ancestral, ddim, grids, hooks, relax
from scoresde import Score, Streams, counted

Method = Callable[[Case, Problem, int, int], tuple[Tensor, float]]
STEPS = 120


def _run(case: Case, P: Problem, n: int, seed: int, make: Callable[..., Any], sampler: Callable[..., Tensor]) -> Any:
    """One run; make(score, grid, noise) -> score, or (score, hook)."""
    noise, score = Streams(seed, n), counted(P.score)
    ts = grids.karras(P.sde, STEPS, t_end=P.t_end)
    made = make(score, ts, noise)
    s, hook = made if isinstance(made, tuple) else (made, ())
    x = P.sde.prior_std * noise(P.target.means.new_empty(n, *P.target.shape))
    return P.data_units(sampler(s, P.sde, x, ts, noise=noise, on_step=hook)), score.samples / n


def transform(rule: Callable[..., Score], sampler: Callable[..., Tensor] = ancestral, **knobs: Any) -> Method:
    """A score transform (score, sde, A, y, noise_sd)."""

    def run(case: Case, P: Problem, n: int, seed: int) -> tuple[Tensor, float]:
        def make(score: Score, ts: Tensor, noise: Any) -> Score:
            return rule(score, P.sde, case.A, case.y, case.noise_sd, **knobs)

        return _run(case, P, n, seed, make, sampler)

    return run


def dps(case: Case, P: Problem, n: int, seed: int) -> tuple[Tensor, float]:
    make = lambda s, ts, noise: guidance.dps(s, P.sde, case.A, case.y, case.noise_sd, zeta=1.0, ts=ts)  # noqa: E731
    return _run(case, P, n, seed, make, ancestral)


def pigdm(case: Case, P: Problem, n: int, seed: int) -> tuple[Tensor, float]:
    return transform(guidance.pigdm, sigma_data=P.sigma_data)(case, P, n, seed)


def chain(rule: Callable[..., Any]) -> Method:
    """A (score, hook) pair for ddim on one grid."""

    def run(case: Case, P: Problem, n: int, seed: int) -> tuple[Tensor, float]:
        def make(score: Score, ts: Tensor, noise: Any) -> Any:
            return rule(score, P.sde, spectral(case.A), case.y, case.noise_sd, ts, noise=noise)

        return _run(case, P, n, seed, make, ddim)

    return run


def daps(case: Case, P: Problem, n: int, seed: int) -> tuple[Tensor, float]:
    make = lambda s, ts, noise: guidance.daps(s, P.sde, case.A, case.y, case.noise_sd, noise=noise)  # noqa: E731
    return _run(case, P, n, seed, make, ddim)


def replacement(case: Case, P: Problem, n: int, seed: int, repeats: int = 0) -> tuple[Tensor, float]:
    """Pixels that are seen are put in after each step; with `repeats`, RePaint."""
    seen = case.A.adjoint(torch.ones_like(case.y)[None])[0]
    known = case.A.adjoint(case.y[None])[0]

    def make(score: Score, ts: Tensor, noise: Any) -> Any:
        put = hooks.inpaint(P.sde, known, seen, noise, noise_sd=case.noise_sd)
        if not repeats:
            return score, put
        above = (case.noise_sd, float("inf"))
        back = hooks.travel(ancestral, score, P.sde, ts, repeats, interval=above, noise=noise, on_step=put)
        return score, back

    return _run(case, P, n, seed, make, ancestral)


def exact(case: Case, P: Problem, n: int, seed: int) -> tuple[Tensor, float]:
    return case.exact.sample(n, seed + 40), 0.0


def default(case: Case, P: Problem, n: int, seed: int) -> tuple[Tensor, float]:
    return posteriors.run(case, P, n, seed=seed)


METHODS: dict[str, Method] = {
    "exact samples": exact,
    "replacement": replacement,
    "repaint": partial(replacement, repeats=4),
    "dps": dps,
    "pigdm": pigdm,
    "tmpd": transform(guidance.tmpd),
    "mmps": transform(guidance.mmps),
    "diffpir": transform(guidance.diffpir),
    "ddnm+": chain(guidance.ddnm_plus),
    "ddrm": chain(guidance.ddrm),
    "daps": daps,
    "anneal, no weights": lambda case, P, n, seed: _annealed(case, P, n, seed),
    "twisted (default)": default,
}
INVERSE = tuple(METHODS)


def _annealed(case: Case, P: Problem, n: int, seed: int) -> tuple[Tensor, float]:
    def make(score: Score, ts: Tensor, noise: Any) -> Any:
        s = guidance.anneal(score, P.sde, case.A, case.y, case.noise_sd, sigma_data=P.sigma_data)
        return s, relax(s, P.sde, 3, noise=noise)

    return _run(case, P, n, seed, make, ancestral)


def judge(n: int, seed: int, cases: int, only: Sequence[str] = INVERSE) -> list[dict[str, Any]]:
    """Every method on `cases` digits under each of two masks, averaged."""
    P, rows = problem("digits"), []
    for name in tqdm([m for m in METHODS if m.split()[0] in only or m in only], desc="inverse problems"):
        ratings, calls = [], 0.0
        for k, case in enumerate(posteriors.digits_cases(cases)):
            x, calls = METHODS[name](case, P, n, seed + k)
            ratings.append(rate(x, case.exact, seed))
        r = average(ratings)
        rows.append(
            {"method": name, "sliced W2": r.sliced_w2, "floor": r.floor, "sd ratio": r.sd_ratio, "band": r.band,
             "mean error": r.mean_error, "modes": r.modes, "calls": calls}
        )  # fmt: skip
    return rows
