"""The Brownian path: its law exactly, its consistency between grids, and what it gives to samplers."""

import itertools
import math
import sys

import pytest
import torch
from truth import F64, SDES, gaussian_score, log_snr_grid, order, tensor, warped_grid

from samplers import ancestral, angle, ddim, euler_maruyama, exponential_euler, grids, sa_solver, sde_dpmpp
from samplers.brownian import brownian, keyed
from scoresde import EDM, VE, VP, mixture

EVERY_SDE = pytest.mark.parametrize("name", SDES)
TAUS = pytest.mark.parametrize("tau", [0.5, 1.0, 1.4])


def increments(sde, ts, samples=2, D=3, seed=0, **knobs):
    """All z of a grid, (N, B, D)."""
    noise, x = brownian(sde, ts, seed, samples, **knobs), None
    B = samples if isinstance(samples, int) else len(samples)
    x = torch.zeros(B, D, dtype=F64)
    return torch.stack([noise(x) for _ in range(len(ts) - 1)])


def start(B):
    return torch.randn(B, 2, generator=torch.Generator().manual_seed(1), dtype=F64)


def distance(a, b):
    return (a - b).square().mean().sqrt().item()


def clock(sde, ts, tau=1.0):
    """c = (alpha/sigma)^(2 tau^2)."""
    return (sde.alpha(ts) / sde.sigma(ts)) ** (2 * tau**2)


@pytest.fixture
def basis(monkeypatch):
    """Node n (in order of first use) draws the unit vector e_n: a z is then the list of its own coefficients.

    The draws being independent N(0, I), covariances are exactly the products of these vectors.
    """
    nodes = {}

    def keyed(*key):
        def draw(node, D):
            e = torch.zeros(D, dtype=F64)
            e[nodes.setdefault((key, node), len(nodes))] = 1
            return e.numpy()

        return draw

    monkeypatch.setattr(sys.modules["samplers.brownian"], "keyed", keyed)
    return nodes


@EVERY_SDE
@TAUS
def test_the_law_is_exact(name, tau, basis):
    """The z of any grid are uncorrelated with variance 1: their coefficients are orthonormal, to rounding."""
    sde = SDES[name]
    for ts in (log_snr_grid(sde, 40), warped_grid(sde, 17), torch.stack([tensor(sde.T), tensor(sde.t_min)])):
        basis.clear()
        z = increments(sde, ts, 1, D=700, tau=tau)[:, 0]
        assert len(basis) < 700
        torch.testing.assert_close(z @ z.T, torch.eye(len(z), dtype=F64), rtol=0, atol=1e-11)


@pytest.mark.parametrize("depth", [1, 3, 6, 20])
def test_the_law_is_exact_at_every_depth(depth, basis):
    """Points in different cells, one of them on a cell's end, also far from T and after a start below T."""
    sde = EDM(T=1.0)
    cell = 32 / 2**depth
    lam = tensor([0.3, 1.0, 2.6, 3.05]) * cell if depth > 1 else tensor([0.4, 1.7]) * cell
    ts = torch.exp(-lam)
    z = increments(sde, ts, 1, D=300, depth=depth)[:, 0]
    torch.testing.assert_close(z @ z.T, torch.eye(len(z), dtype=F64), rtol=0, atol=1e-11)


def test_samples_are_independent(basis):
    z = increments(VP(), log_snr_grid(VP(), 9), 3, D=900)  # (9, 3, 900)
    z = z.flatten(0, 1)
    torch.testing.assert_close(z @ z.T, torch.eye(27, dtype=F64), rtol=0, atol=1e-11)


def test_the_normals_are_normal():
    """20 000 numbers of one increment, of their sum over a grid, and of neighbouring samples, seeds and dimensions."""
    ts = log_snr_grid(VP(), 4)
    z = increments(VP(), ts, 200, D=100)
    n = z[0].numel()
    for v in (*z, z.sum(0) / 2, (z[:, 1:] - z[:, :-1]) / 2**0.5):
        error = n**-0.5 * (1 if v.ndim == 2 else 0.5)
        assert abs(v.mean().item()) < 4 * error * 1.5
        assert v.var().item() == pytest.approx(1, abs=4 * error * 2)
        assert (v**4).mean().item() == pytest.approx(3, abs=4 * error * 96**0.5 * 1.5)
    other = increments(VP(), ts, 200, D=100, seed=1)
    assert abs((z * other).mean().item()) < 4 / z.numel() ** 0.5
    assert abs((z[:-1] * z[1:]).mean().item()) < 4 / z[1:].numel() ** 0.5
    assert abs((z[:, :, :-1] * z[:, :, 1:]).mean().item()) < 4 / z[..., 1:].numel() ** 0.5


def test_nodes_share_no_numbers():
    """A node gives its own numbers again, and no other node or key gives one of them."""
    one = keyed(3, 1)
    rows = [keyed(*key)(node, 500) for key in ((3, 1), (3, 2), (4, 1)) for node in (0, 1, 2, 3, 2**40)]
    assert len({v for row in rows for v in row}) == 15 * 500
    one(7, 10)
    assert (one(2, 500) == rows[2]).all()


@EVERY_SDE
@TAUS
def test_a_coarse_grid_sums_a_fine_one(name, tau):
    """sqrt(c1 - c) z = sum of sqrt(dc) z over any refinement, nested grids or not."""
    sde = SDES[name]
    fine = torch.cat([log_snr_grid(sde, 64), log_snr_grid(sde, 37)[1:-1]]).sort(descending=True).values
    fine = fine[torch.cat([tensor([True]), -fine.diff() > 1e-9 * fine[1:]]).bool()]
    c, z = clock(sde, fine, tau), increments(sde, fine, tau=tau, depth=24)
    B = torch.cat([torch.zeros_like(z[:1]), (z * c.diff().sqrt()[:, None, None]).cumsum(0)])
    for coarse in (log_snr_grid(sde, 37), log_snr_grid(sde, 64)[::4], fine[[0, -1]], fine[5:40:3]):
        at = torch.searchsorted(-fine, -coarse)
        torch.testing.assert_close(fine[at], coarse, rtol=1e-9, atol=0)
        width = clock(sde, fine[at], tau).diff().sqrt()[:, None, None]
        want = B[at].diff(dim=0) / width
        got = increments(sde, fine[at], tau=tau, depth=24)
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


def test_refinement_to_rounding():
    """On EDM, whose clock 1/t^2 has no rounding of its own, the sums agree to 1e-12."""
    fine = EDM().T / 2 ** torch.arange(0, 12, 0.25, dtype=F64)
    z, c = increments(EDM(), fine), clock(EDM(), fine)
    for every in (2, 4, 47):
        got = increments(EDM(), fine[::every])
        n = len(got)
        want = (z * c.diff().sqrt()[:, None, None])[: n * every].reshape(n, every, 2, 3).sum(1)
        want = want / c[::every].diff().sqrt()[:, None, None]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def falling(r):
    return 1 / (1 + r)


def within(r):
    """0 but from r = 0.3 to 1.2."""
    return 1.3 * ((r > 0.3) & (r <= 1.2))


def twice(r):
    """0 but from r = 0.3 to 1.2, and above 3."""
    return within(r) + 0.7 * (r > 3)


@EVERY_SDE
@pytest.mark.parametrize("tau", [falling, within, twice])
def test_the_law_is_exact_for_a_tau_that_varies(name, tau, basis):
    """Orthonormal again, and with a z for each step that starts where tau is not 0."""
    sde = SDES[name]
    for ts in (log_snr_grid(sde, 40), warped_grid(sde, 17)):
        basis.clear()
        noise, x = brownian(sde, ts, 0, 1, tau=tau), torch.zeros(1, 700, dtype=F64)
        drawn = (tau(torch.exp(-sde.lam(ts[:-1]))) > 0).sum()
        z = torch.cat([noise(x) for _ in range(drawn)])
        torch.testing.assert_close(z @ z.T, torch.eye(len(z), dtype=F64), rtol=0, atol=1e-11)
        with pytest.raises(ValueError, match=f"all {drawn} increments"):
            noise(x)


def test_the_clock_of_a_tau_that_varies():
    """log c = 2 int tau^2 dlam, dlam = -dr/r: for tau = 1/(1 + r) it is 2 [log((1 + r)/r) - 1/(1 + r)]."""
    ts = torch.exp(torch.linspace(math.log(80), math.log(0.002), 61, dtype=F64))
    c = torch.exp(2 * ((1 + ts) / ts).log() - 2 / (1 + ts))
    fine, coarse = (increments(EDM(), g, tau=falling, depth=20) for g in (ts, ts[::6]))
    want = (fine * c.diff().sqrt()[:, None, None]).unflatten(0, (10, 6)).sum(1) / c[::6].diff().sqrt()[:, None, None]
    torch.testing.assert_close(coarse, want, rtol=0, atol=1e-5)


def test_steps_of_tau_are_exact_for_a_point_mass():
    """tau 0, 1.3, 0.6 and 0 on four stretches: any grid with these ends on it gives the same end, to 1e-9."""
    sde, ends = EDM(), 80 * torch.exp(-tensor([0.0, 2.0, 4.5, 6.0, 8.0]))  # ends of cells

    def tau(r):
        return tensor(0.0, 1.3, 0.6, 0.0)[torch.bucketize(-r * (1 - 1e-9), -ends[1:-1], right=True)]

    def run(n, seed=0):
        lam = [torch.linspace(float(a.log()), float(b.log()), n + 1, dtype=F64) for a, b in itertools.pairwise(ends)]
        ts = torch.cat([lam[0], *(u[1:] for u in lam[1:])]).exp()
        noise = brownian(sde, ts, seed, 3, tau=tau)
        return exponential_euler(
            gaussian_score(sde, 1.3, 0.0), sde, torch.ones(3, 2, dtype=F64), ts, tau=tau, noise=noise
        )

    torch.testing.assert_close(run(1), run(7), rtol=1e-9, atol=1e-9)
    assert (run(1) - run(7, seed=1)).abs().max() > 1e-3


@EVERY_SDE
def test_one_step_is_many_for_a_point_mass(name):
    """x0 is constant there, so the ancestral step is the SDE's own solution: any grid, the same end, to 1e-9."""
    sde = SDES[name]
    score, x = gaussian_score(sde, 1.3, 0.0), torch.ones(2, 3, dtype=F64)
    end = 0.1 * sde.T if name != "VE" else 0.5
    ends = []
    for n in (1, 2, 7, 32):
        ts = log_snr_grid(sde, n, end=end)
        ends.append(ancestral(score, sde, x, ts, noise=brownian(sde, ts, 5, 2)))
        plain = ancestral(score, sde, x, ts, noise=brownian(sde, ts, 6, 2))
        assert (plain - ends[0]).abs().max() > 1e-3 * sde.sigma(tensor(end))  # another path ends elsewhere
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=1e-9, atol=1e-10)


@TAUS
@EVERY_SDE
def test_any_tau_is_exact_for_a_point_mass(name, tau):
    """Steps of the tau-SDE written from the module's text: x1 = (Phi1/Phi) x + ... + Phi1 sqrt(c1 - c) z."""
    sde, x0 = SDES[name], 1.3

    def run(n):
        ts = log_snr_grid(sde, n, end=0.1 * sde.T if name != "VE" else 0.5)
        noise, x = brownian(sde, ts, 5, 1, tau=tau), torch.ones(1, 4, dtype=F64)
        for t, t1 in itertools.pairwise(ts):
            a, s, a1, s1 = sde.alpha(t), sde.sigma(t), sde.alpha(t1), sde.sigma(t1)
            q = (s1 * a / (s * a1)) ** (2 * tau**2)  # exp(-2 tau^2 h)
            m = (s1 / s) * q**0.5
            x = m * x + (a1 - m * a) * x0 + s1 * (1 - q) ** 0.5 * noise(x)
        return x

    torch.testing.assert_close(run(24), run(3), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(run(24), run(1), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sampler", [ancestral, euler_maruyama])
@pytest.mark.parametrize("sde", [VP(), VE()])
def test_strong_order(sampler, sde):
    """N and 2N steps on one path: the root mean square distance halves, on a mixture."""
    target = mixture(tensor(0.3, 0.7), tensor([[-1.0, 0.5], [1.0, 0.0]]), var=tensor(0.6, 0.4)).score(sde)
    x = 5 * sde.alpha(sde.time(-tensor(5.0).log())) * start(300)

    def run(n, seed=0):
        ts = warped_grid(sde, n)
        return sampler(target, sde, x, ts, noise=brownian(sde, ts, seed, 300, depth=16))

    errors = [distance(a, b) for a, b in itertools.pairwise([run(n) for n in (16, 32, 64, 128)])]
    assert sum(order(errors)) / 2 == pytest.approx(1, abs=0.15), errors
    assert distance(run(64), run(128, seed=1)) > 20 * errors[-1]  # on two paths there is no such thing


@pytest.mark.parametrize("tau", [falling, within])
@pytest.mark.parametrize("sampler", [exponential_euler, sde_dpmpp, sa_solver, angle])
def test_strong_order_with_a_tau_that_varies(sampler, tau):
    """As above, for all samplers whose tau may; at least 1, as the flow's part is of order 2 in the multistep ones."""
    sde, B = VP(), 300
    target = mixture(tensor(0.3, 0.7), tensor([[-1.0, 0.5], [1.0, 0.0]]), var=tensor(0.6, 0.4)).score(sde)
    x = 5 * sde.alpha(sde.time(-tensor(5.0).log())) * start(B)

    def run(n, seed=0):
        r = torch.exp(torch.linspace(math.log(5), math.log(0.1), n + 1, dtype=F64))
        r = torch.cat([r, tensor(0.3, 1.2)]).sort(descending=True).values  # tau's ends
        ts = sde.time(-r.log())
        return sampler(target, sde, x, ts, tau=tau, noise=brownian(sde, ts, seed, B, tau=tau, depth=16))

    errors = [distance(a, b) for a, b in itertools.pairwise([run(n) for n in (16, 32, 64, 128)])]
    assert sum(order(errors)) / 2 > 0.85, errors
    assert distance(run(64), run(128, seed=1)) > 10 * errors[-1]


def test_a_sample_alone_is_the_same_as_in_a_batch():
    ts = log_snr_grid(VP(), 6)
    whole = increments(VP(), ts, 6, seed=7)
    for part in (range(2, 3), [4, 0], range(6)):
        assert torch.equal(increments(VP(), ts, part, seed=7), whole[:, list(part)])
    assert not torch.equal(increments(VP(), ts, 6, seed=8), whole)


def test_it_looks_like_its_argument():
    ts = log_snr_grid(VP(), 3)
    noise, flat = brownian(VP(), ts, 0, 2), increments(VP(), ts, D=12)
    for z in flat:
        got = noise(torch.zeros(2, 3, 4))
        assert got.dtype == torch.float32
        assert torch.equal(got, z.reshape(2, 3, 4).float())


def test_parts_of_a_grid_and_runs_to_zero():
    """The path does not know where a run starts; a last step to t = 0 is not part of it."""
    ts = grids.karras(EDM(), 12, to_zero=True)
    whole = increments(EDM(), ts[:-1])
    assert torch.equal(increments(EDM(), ts[:-1])[4:], increments(EDM(), ts[4:-1]))
    x = torch.ones(2, 3, dtype=F64)
    run = lambda noise: ancestral(gaussian_score(EDM()), EDM(), x, ts, noise=noise)  # noqa: E731
    draws = iter(whole)
    assert torch.equal(run(brownian(EDM(), ts, 0, 2)), run(lambda x: next(draws)))


def test_errors():
    ts, x = log_snr_grid(VP(), 3), torch.zeros(2, 3)
    for knobs, match in (
        ({"tau": 0.0}, "tau must be positive.*got 0.0"),
        ({"tau": math.inf}, "got inf"),
        ({"depth": 0}, r"depth must lie in 1\.\.48, got 0"),
        ({"depth": 49}, "got 49"),
        ({"samples": []}, "indices >= 0"),
        ({"samples": [0, -1]}, r"got \[0, -1\]"),
        ({"ts": ts.flip(0)}, "must decrease"),
        ({"ts": tensor(1.5, 0.5)}, r"T = 1\], got 1.5"),
        ({"ts": tensor(0.5, 0.499999)}, r"ts\[0\] = 0.5 and ts\[1\] = 0.499999 lie in one cell.*0.00195.*larger depth"),
    ):
        with pytest.raises(ValueError, match=match):
            brownian(**{"sde": VP(), "ts": ts, "seed": 0, "samples": 2, **knobs})
    brownian(VP(), tensor(0.5, 0.499999), 0, 2, depth=24)
    for tau, match in (
        (
            lambda r: 1.0 * (r > 0.3678),
            r"tau is not 0 at ts\[1\] = 0.367\d*, but 0 from there to ts\[2\].*let tau be 0",
        ),
        (lambda r: 1 / (r - r), "tau is not finite"),
    ):
        with pytest.raises(ValueError, match=match):
            brownian(EDM(T=1.0), torch.exp(-tensor(0, 1.0, 2.0)), 0, 2, tau=tau)
    with pytest.raises(ValueError, match=r"lam\(T\) \+ 32; t = 1e-15 lies 38.9208 above.*end the grid earlier"):
        brownian(EDM(), tensor(80, 1e-15), 0, 2)
    noise = brownian(VP(), ts, 0, 2)
    with pytest.raises(ValueError, match=r"2 samples for a batch of 3.*range\(first, last\)"):
        noise(torch.zeros(3, 3))
    noise(x)
    with pytest.raises(ValueError, match="samples of 3 numbers, this state has 4"):
        noise(torch.zeros(2, 4))
    noise(x), noise(x)
    with pytest.raises(ValueError, match=r"all 3 increments of this grid are drawn.*new brownian"):
        noise(x)


def test_draws_are_few(basis):
    """A call draws about depth + 1 - log2(32/(lam1 - lam)) times: the upper tree is shared."""
    sde, n = VP(), 128
    ts = log_snr_grid(sde, n)
    h = float(sde.lam(ts[-1]) - sde.lam(ts[0])) / n
    increments(sde, ts, 1, D=4000)
    assert len(basis) / n < 14 + 2 - math.log2(32 / h)


def test_ddim_with_eta_shares_the_path_in_the_limit():
    """eta < 1 is no tau-step exactly, but its noise tends to the path's: distances fall with the step."""
    sde, eta, x = VP(), 0.6, start(100)
    ends = []
    for n in (64, 128, 256):
        ts = warped_grid(sde, n)
        ends.append(ddim(gaussian_score(sde), sde, x, ts, eta=eta, noise=brownian(sde, ts, 0, 100, tau=eta, depth=16)))
    errors = [distance(a, b) for a, b in itertools.pairwise(ends)]
    assert order(errors)[0] == pytest.approx(1, abs=0.15)
