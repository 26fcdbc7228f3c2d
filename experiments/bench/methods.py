"""What runs in the work-precision study: ours and other libraries' samplers on any grid, within a budget of calls."""

import ast
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import samplers
from experiments import peers as others
from experiments.problems import NAMES, problem, rms, rms95
from samplers import grids
from scoresde import counted
from scoresde.types import SDE, Noise, Score


@dataclass(frozen=True, eq=False)
class Case:
    """A problem with its starts x at sde.T and the exact flow's endpoints at t_end."""

    name: str
    sde: SDE
    score: Score
    t_end: float
    sigma_data: float
    x: Tensor
    exact: Tensor

    def errors(self, x1: Tensor) -> tuple[float, float]:
        """rms95 and rms in data units."""
        alpha = float(self.sde.alpha(torch.tensor(self.t_end, dtype=torch.float64)))
        return rms95(x1 / alpha, self.exact / alpha), rms(x1 / alpha, self.exact / alpha)


@dataclass(frozen=True)
class Method:
    """Something that runs within a budget: steps(n) -> run(case) -> x at t_end."""

    library: str
    name: str
    grid: str
    run: Callable[[Case, Score, Tensor, int], Tensor]  # (case, score, x at T, steps)


def fitting(calls: Callable[[int], int | None], nfe: int) -> int | None:
    """The largest number of steps with calls(steps) <= nfe; None if not even one step has.

    calls(steps) is counted on a run, None where the method refuses that number of steps.
    """
    return next((n for n in range(nfe, 0, -1) if (c := calls(n)) is not None and c <= nfe), None)


def our_grids() -> dict[str, Callable[..., Tensor]]:
    """The public functions (sde, n, *, t_end, ...) of `samplers.grids`, each once."""
    found: dict[str, Callable[..., Tensor]] = {}
    for name, f in vars(grids).items():
        if name.startswith("_") or not inspect.isfunction(f) or f in found.values():
            continue
        p = inspect.signature(f).parameters
        required = [k for k, v in p.items() if v.default is v.empty]
        if required == ["sde", "n"] and "t_end" in p:
            found[name] = f
    return found


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """ "angle:order=4:corrected=False" as (name, knobs)."""
    name, *knobs = spec.split(":")
    out = {}
    for knob in knobs:
        key, sep, value = knob.partition("=")
        if not sep:
            raise ValueError(f"a knob is written name=value, got {knob!r} in {spec!r}")
        try:
            out[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            out[key] = value
    return name, out


def told(f: Callable[..., Any], knobs: dict[str, Any], case: Case) -> dict[str, Any]:
    """The knobs, and the data's standard deviation if f takes it (as `d` or `sigma_data`) and they do not say it."""
    takes = inspect.signature(f).parameters
    return {k: case.sigma_data for k in ("d", "sigma_data") if k in takes} | knobs


class Stochastic(Exception):
    """Raised by a sampler that draws noise: its endpoint is not the flow's."""


def no_noise(_: Tensor) -> Tensor:
    raise Stochastic


def ours(spec: str, grid_specs: Sequence[str], noise: Noise = no_noise) -> list[Method]:
    """One of `samplers.SAMPLERS` on each grid, both with knobs.  They are told sigma_data if they take it."""
    if spec in FITTED:
        return [fitted(spec)]
    name, knobs = parse(spec)
    if name not in samplers.SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; choose from {', '.join(samplers.SAMPLERS)}")
    sampler, known = samplers.SAMPLERS[name], our_grids()
    _check_knobs(sampler, name, knobs)

    def on(grid_spec: str) -> Method:
        grid, more = parse(grid_spec)
        if grid not in known:
            raise ValueError(f"unknown grid {grid!r}; choose from {', '.join(known)}")
        _check_knobs(known[grid], grid, more)

        def run(case: Case, score: Score, x: Tensor, steps: int) -> Tensor:
            ts = known[grid](case.sde, steps, t_end=case.t_end, **told(known[grid], more, case))
            return sampler(score, case.sde, x, ts, noise=noise, **told(sampler, knobs, case))

        return Method("scoresde", spec, grid_spec, run)

    return [on(g) for g in grid_specs]


FITTED = ("searched", "calibrated")


def fitted(name: str) -> Method:
    """`auto` with what was fitted on 64 or 512 other starts: a grid, searched up to 20 steps; a solver, up to 25.

    "calibrated" runs on a grid above 25 steps.
    """
    made: dict[tuple[str, int], samplers.FittedGrid | samplers.Calibration] = {}

    def run(case: Case, score: Score, x: Tensor, steps: int) -> Tensor:
        if case.name not in NAMES:
            raise ValueError(f"{name} is for the exact problems, not for {case.name!r}; see experiments.fit")
        key = (case.name, steps)
        if key not in made:
            s, sde, d, end = case.score, case.sde, case.sigma_data, case.t_end
            if name == "searched" or steps > 25:
                fresh = problem(case.name).start(64, 7001)
                grid = samplers.fit_grid(s, sde, fresh, d=d, t_end=end)
                made[key] = grid.search(s, sde, fresh, steps, progress=False) if steps <= 20 else grid
            else:
                fresh = problem(case.name).start(512, 7002)
                made[key] = samplers.calibrate(s, sde, fresh, steps, d=d, t_end=end, progress=False)
        return samplers.auto(score, case.sde, x, steps, fitted=made[key])

    return Method("scoresde", name, "its own", run)


def _check_knobs(f: Callable[..., Any], name: str, knobs: dict[str, Any]) -> None:
    takes = [k for k, v in inspect.signature(f).parameters.items() if v.kind is v.KEYWORD_ONLY]
    if unknown := [k for k in knobs if k not in takes]:
        raise ValueError(f"{name} has no knob {unknown[0]!r}; its knobs are {', '.join(takes) or 'none'}")


def deterministic(case: Case) -> list[str]:
    """The samplers that follow the flow on a fixed grid: no noise drawn, calls set by the grid alone."""
    names = []
    for name in samplers.SAMPLERS:
        if name == "ode":  # its steps are its own
            continue
        if not is_noisy(case, name):
            names.append(name)
    return names


def is_noisy(case: Case, spec: str) -> bool:
    """Whether it draws noise."""
    if spec in FITTED:
        return False
    try:
        dry(case, ours(spec, ["uniform"])[0], 4)
    except Stochastic:
        return True
    return False


def dry(case: Case, method: Method, steps: int) -> int | None:
    """Calls counted on two samples of Gaussian data of the case's shape; None if the method refuses these steps."""
    sd2 = case.sigma_data**2

    def gaussian(x: Tensor, t: Tensor) -> Tensor:
        return -x / (case.sde.alpha(t) ** 2 * sd2 + case.sde.sigma(t) ** 2).to(x)

    score = counted(gaussian)
    try:
        with drawing(0):
            method.run(case, score, case.x[:2], steps)
    except (ArithmeticError, ValueError):
        return None
    return score.calls


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """torch's default generator from this seed on, and as it was afterwards: libraries take their noise from it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def steps_within(case: Case) -> Callable[[Method, int], int | None]:
    """(method, nfe) -> the steps that budget of calls allows, by `dry` runs that are made once."""
    known: dict[tuple[str, str, str, int], int | None] = {}

    def calls(method: Method, n: int) -> int | None:
        if method.name in FITTED:  # a dry run on another score would be refused, rightly
            return n
        key = (method.library, method.name, method.grid if method.library == "scoresde" else "any", n)
        if key not in known:
            known[key] = dry(case, method, n)
        return known[key]

    return lambda method, nfe: fitting(lambda n: calls(method, n), nfe)


def theirs(case: Case, libraries: tuple[str, ...], *, noisy: bool = False) -> list[Method]:
    """Every sampler of the libraries, on the flow or noisy, on every grid of all of them."""
    ends = torch.tensor([case.sde.T, case.t_end], dtype=torch.float64)
    r0, r1 = (float(v) for v in torch.exp(-case.sde.lam(ends)))
    alpha, alpha1 = (float(v) for v in case.sde.alpha(ends))
    known = others.grids(r0, r1)

    def on(peer: others.Peer, grid: str) -> Method:
        def run(case: Case, score: Score, x: Tensor, steps: int) -> Tensor:
            return peer.run(others.eps_of(score, case.sde), x / alpha, known[grid](steps)) * alpha1

        return Method(peer.library, peer.name, grid, run)

    found = []
    for peer in others.peers(libraries, noisy=noisy):
        for grid in filter(peer.takes, known):
            method = on(peer, grid)
            found.append(replace(method, grid="its own") if peer.own_grid else method)
    return found
