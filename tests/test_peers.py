"""Other libraries' samplers end where the exact flow does, or in the exact law; their grids are what they say."""

import importlib.util
import itertools
import math
import sys

import pytest
import torch
from truth import F64, tensor

from experiments import peers
from experiments.bench.methods import drawing, theirs
from experiments.bench.runs import exact_case
from experiments.problems import problem, rms


def all_peers():
    return [q for library in peers.LIBRARIES if peers.installed(library) for q in peers.peers((library,))]


R0, R1 = 152.0, 0.0105
ORDER = {  # on Gaussian data; multistep ones of order 3 and more start at order 1, and so end near 2
    "DDIM": 1, "Euler": 1, "euler": 1, "REAB-2": 1, "REAB-3": 1, "REAB-4": 1,  # REAB: a sigma at the wrong time
    "accelerated": 1,  # its two values are as if their sum of weights were all
    "rk4": 4, "rk4 in time": 4, "rk4 in log": 4, "heun3": 3, "heun3 in time": 3, "heun3 in log": 3,
    "DPM-Solver++ 3S": 3, "DPM-Solver 3S": 3,
}  # fmt: skip


@pytest.mark.parametrize("peer", all_peers(), ids=lambda q: q.label.replace(" ", "_"))
def test_a_peer_converges_to_the_exact_flow(peer):
    """y1 = y sqrt((v + r1^2)/(v + r0^2)) for N(0, v) data, on its own or the exponential grid."""
    v = tensor(0.01, 0.25, 4.0)
    y = torch.linspace(-200, 200, 6, dtype=F64)[:, None] * torch.ones(3, dtype=F64)
    exact = y * ((v + R1**2) / (v + R0**2)).sqrt()
    seen = []

    def eps(y, r):
        assert r.dtype == F64
        assert r.ndim == 0
        assert R1 * (1 - 1e-6) <= float(r) <= R0 * (1 + 1e-6)
        seen.append(float(r))
        return y * r / (v + r**2)

    grid = peers.grids(R0, R1)["exponential"]
    error = {}
    for N in (48, 96):
        start = y.clone()
        error[N] = (peer.run(eps, start, grid(N)) - exact).abs().max()
        assert torch.equal(start, y)
    assert seen[0] == pytest.approx(R0, rel=1e-6)
    order = ORDER.get(peer.name.removesuffix(" full"), 2)
    floor = 3e-6 if peer.library == "diffusers" else 1e-9  # some of them are float32 inside
    assert math.log2(error[48] / error[96]) > order - 0.3 or error[96] < floor
    assert error[96] < (0.1 if order == 1 else 0.02)


def all_noisy():
    return [q for library in peers.LIBRARIES if peers.installed(library) for q in peers.peers((library,), noisy=True)]


@pytest.fixture
def draws(monkeypatch):
    """Draw i is 1 in row 1 + i and 0 elsewhere; a list, which grows with every draw."""
    seen = []

    def unit(*shape, dtype=None, **_):
        z = torch.zeros(*shape, dtype=dtype)
        z[1 + len(seen) : 2 + len(seen)] = 1
        seen.append(1)
        return z

    monkeypatch.setattr(torch, "randn", unit)
    monkeypatch.setattr(torch, "randn_like", lambda x: unit(*x.shape, dtype=x.dtype))
    return seen


SECOND = ("2M", "2,2", "3,3", "dpmpp_2m", "dpmpp_3m", "dpm_2", "heun", "Ito")


@pytest.mark.parametrize("peer", all_noisy(), ids=lambda q: q.label.replace(" ", "_"))
def test_a_noisy_peer_has_the_exact_law_in_the_limit(peer, draws):
    """Variances for N(0, v) data, exactly: a run is linear in y and its draws, so y = 1 and each draw = 1 tell all.

    Order 2 where the sampler claims it, but for those that are seen to have 1.
    """
    v = tensor(0.01, 0.25, 4.0)
    grid = peers.grids(R0, R1)["exponential"]

    def eps(y, r):
        assert R1 * (1 - 1e-6) <= float(r) <= R0 * (1 + 1e-6)
        return y * r / (v + r**2)

    error = {}
    for N in (100, 200):
        y = torch.zeros(4 * N, 3, dtype=F64)
        y[0] = 1
        draws.clear()
        out = peer.run(eps, y, grid(N))
        assert N - 2 <= len(draws) < 4 * N - 1
        var = out[0].double() ** 2 * (v + R0**2) + out[1:].double().square().sum(0)
        error[N] = float((var / (v + R1**2) - 1).abs().max())
    second = any(name in peer.name for name in SECOND)
    assert math.log2(error[100] / error[200]) > (1.5 if second else 0.8), error
    assert error[200] < (0.03 if second else 0.3)


@pytest.mark.parametrize("peer", all_noisy(), ids=lambda q: q.label.replace(" ", "_"))
def test_a_noisy_peer_draws_from_the_default_generator(peer):
    grid, y = peers.grids(R0, R1)["karras"](6), torch.ones(2, 3, dtype=F64)
    runs = []
    for seed in (1, 1, 2):
        with drawing(seed):
            runs.append(peer.run(lambda y, r: y * r / (1 + r**2), y, grid))
    assert torch.equal(runs[0], runs[1])
    assert (runs[0] - runs[2]).abs().min() > 1e-6
    assert (runs[0][0] - runs[0][1]).abs().min() > 1e-6  # samples apart


def test_no_peer_is_both():
    names = [q.label for q in all_peers()]
    assert len(set(names)) == len(names)
    assert not any(q.noisy for q in all_peers())
    assert len({q.label for q in all_noisy()}) == len(all_noisy())


@pytest.mark.skipif(not peers.installed("flow_matching"), reason="flow_matching is not installed")
def test_flow_matching_is_its_method_written_out():
    """midpoint on x = (1 - t) x0 + t eps."""
    p = problem("2d")
    eps, (r0, r1) = peers.eps_of(p.score, p.sde), p.noise_levels()
    y = p.start(3) / p.sde.alpha(tensor(1.0))
    grid = peers.grids(r0, r1)["flow"](6)
    t = grid.r / (1 + grid.r)

    def v(x, t):
        e = eps(x / (1 - t), t / (1 - t))
        return e - (x - t * e) / (1 - t)

    x = y * (1 - t[0])
    for a, b in itertools.pairwise(t):
        x = x + (b - a) * v(x + (b - a) / 2 * v(x, a), (a + b) / 2)
    peer = next(q for q in peers.peers(("flow_matching",)) if q.name == "midpoint")
    assert torch.allclose(peer.run(eps, y, grid), x / (1 - t[-1]), rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not peers.installed("azula"), reason="azula is not installed")
def test_ddim_is_ddim_in_every_library():
    """Euler in sigma/alpha, written here; so a peer is on the grid it is given, at the noise levels of that grid."""
    p = problem("2d")
    eps = peers.eps_of(p.score, p.sde)
    alpha = p.sde.alpha(torch.tensor(1.0, dtype=F64))
    y0 = p.start(5) / alpha
    r0, r1 = p.noise_levels()
    for name, make in peers.grids(r0, r1).items():
        grid, y = make(7), y0
        for r, s in zip(grid.r, grid.r[1:], strict=False):
            y = y + (s - r) * eps(y, r)
        for peer in all_peers():
            if peer.name in ("DDIM", "Euler", "euler"):
                tol = 1e-4 if peer.label == "diffusers Euler" else 1e-9  # float32 inside
                assert (peer.run(eps, y0, grid) - y).abs().max() < tol, (peer.label, name)


@pytest.mark.parametrize("name", ["2d", "digits"])
def test_peers_end_where_the_case_ends(name):
    """In x, not in y = x/alpha: a peer of order 4 with many steps meets the case's own endpoints."""
    case = exact_case(problem(name), 3)
    methods = theirs(case, ("torchdiffeq",))
    method = next(m for m in methods if (m.name, m.grid) == ("rk4 in log", "exponential"))
    assert rms(method.run(case, case.score, case.x, 200), case.exact) < 1e-5
    assert len(methods) == len({(m.name, m.grid) for m in methods})


def test_eps_is_that_of_the_score():
    p = problem("digits")
    r = tensor(0.7)
    y = p.draw(3, 0, 0.7)
    x0 = p.target.denoiser(p.sde)(y, r)
    assert torch.allclose(peers.eps_of(p.score, p.sde)(y, r), (y - x0) / r, atol=1e-10)
    q = problem("2d")
    t = tensor(0.4)
    x = q.draw(3, 0, 0.4)
    a, s = q.sde.alpha(t), q.sde.sigma(t)
    assert torch.allclose(
        peers.eps_of(q.score, q.sde)(x / a, s / a), (x - a * q.target.denoiser(q.sde)(x, t)) / s, atol=1e-9
    )


def test_grids_run_from_end_to_end():
    for r0, r1 in ((152.17, 0.0105), (80.0, 0.002)):
        made = peers.grids(r0, r1)
        assert {"time", "time_quadratic", "karras", "exponential", "flow", "cosine"} <= set(made)
        for name, make in made.items():
            for n in (1, 5, 50):
                r = make(n).r
                assert (len(make(n)), len(r)) == (n, n + 1)
                assert bool((r.diff() < 0).all()), name
                assert math.isclose(r[0], r0, rel_tol=1e-12)
                assert math.isclose(r[-1], r1, rel_tol=1e-12)
        r = made["karras"](4).r ** (1 / 7)
        assert (r.diff().diff()).abs().max() < 1e-12
        assert (made["exponential"](4).r.log().diff().diff()).abs().max() < 1e-12
        u = (r := made["flow"](4).r) / (1 + r)
        assert u.diff().diff().abs().max() < 1e-12
        B = torch.log1p(made["time"](4).r ** 2)  # 0.1 t + 9.95 t^2
        t = (-0.1 + (0.01 + 4 * 9.95 * B).sqrt()) / (2 * 9.95)
        assert t.diff().diff().abs().max() < 1e-12


def test_who_has_which_grid():
    names = set(peers.grids(R0, R1)) | {"its own"}
    for library, grids in peers.SHIPPED.items():
        assert {g for g in grids if peers.installed("azula") or "azula" not in g} <= names
        assert all(peers.shipped(library, g) for g in grids)
        assert not peers.shipped(library, "time_quadratic")
    assert peers.shipped("torchdiffeq", "time_quadratic")
    for library in peers.LIBRARIES:
        peer = peers.Peer(library, "p", lambda eps, y, grid: y)
        assert peer.takes("karras")
        assert peer.takes("azula VE") == (library == "azula")
        assert peer.takes("exponential") == (library != "azula")  # azula has it as its VE
    fast = peers.Peer("k_diffusion", "p", lambda eps, y, grid: y, own_grid=True)
    assert [g for g in names if fast.takes(g)] == ["exponential"]


@pytest.mark.skipif(not peers.installed("k_diffusion"), reason="k-diffusion is not installed")
def test_the_stand_in_for_k_diffusion_is_taken_away():
    before = "k_diffusion" in sys.modules
    peers.k_sampling.cache_clear()
    assert peers.k_sampling().__name__ == "k_diffusion.sampling"
    assert ("k_diffusion" in sys.modules) == before
    assert importlib.util.find_spec("k_diffusion") is not None


def test_unknown_and_missing_libraries(monkeypatch):
    with pytest.raises(ValueError, match="unknown library 'nope'; choose from diffusers"):
        peers.peers(("nope",))
    monkeypatch.setattr(peers, "installed", lambda name: False)
    with pytest.raises(ImportError, match=r"azula is not installed; pip install 'scoresde\[bench\]'"):
        peers.peers(("azula",))
