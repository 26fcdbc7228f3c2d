"""Bounds on -log p against closed forms, exact densities and counted cell masses."""

import itertools
import math

import pytest
import torch
from scipy.integrate import quad
from torch.distributions import MultivariateNormal, kl_divergence
from truth import F64, SDES, tensor

from scoresde import EDM, VP, Streams, counted, gaussian, mixture, rowwise
from scoresde.bounds import bounds, chain_bound

M, C = tensor(0.4, -1.0, 0.2), tensor([[1.0, 0.5, 0.1], [0.5, 0.6, 0.0], [0.1, 0.0, 0.3]])
FULL = gaussian(M, cov=C)
OTHER = gaussian(tensor(0.0, -0.5, 0.5), var=tensor(0.8, 1.0, 0.2))
X = tensor([[0.5, -0.7, 0.0], [2.0, 0.4, -1.0], [-1.0, -2.0, 0.3], [0.3, -1.1, 0.2]])
EYE = torch.eye(3, dtype=F64)


def moments(target):
    """The Gaussian with a mixture's mean and covariance."""
    w, m = target.log_weights.exp(), target.means
    cov = torch.einsum("k,kd,ke->de", w, m - w @ m, m - w @ m)
    basis = torch.eye(m.shape[1], dtype=F64).expand(len(w), -1, -1) if target.basis is None else target.basis
    if target.eig.shape[1]:
        cov = cov + torch.einsum("k,kdr,kr,ker->de", w, basis, target.eig, basis)
    cov = cov + (w @ target.floor) * torch.eye(m.shape[1], dtype=F64)
    return gaussian((w @ m).reshape(target.shape), cov=cov)


def ratio(sde, t):
    return float(sde.sigma(tensor(t)) / sde.alpha(tensor(t)))


def smoothed(x, r, m=M, c=C):
    """-E log N(x + r eps; m, c + r^2 I)."""
    V = c + r**2 * torch.eye(len(m), dtype=F64)
    return -MultivariateNormal(m, V).log_prob(x) + 0.5 * r**2 * torch.linalg.inv(V).trace()


@pytest.mark.parametrize("name", SDES)
def test_gaussian_terms_item_by_item(name):
    """Each term against torch.distributions, quadrature and the identity total = -E log p_r0(x + r0 eps)."""
    sde = SDES[name]
    got = bounds(FULL.score(sde), sde, X, FULL, calls=4, noise=Streams(0, 4))
    assert got.error.max() < 1e-6  # score and reference agree
    a, s = sde.alpha(tensor(sde.T)), sde.sigma(tensor(sde.T))
    at_T = MultivariateNormal(a * X, s**2 * EYE)
    want = kl_divergence(at_T, MultivariateNormal(torch.zeros(3, dtype=F64), sde.prior_std**2 * EYE))
    torch.testing.assert_close(got.prior, want, rtol=1e-9, atol=1e-9)
    r0, rT = ratio(sde, sde.t_min), ratio(sde, sde.T)

    def excess(u, x):  # E|eps - eps_hat|^2, eps_hat = r V^-1 (x - m + r eps)
        A = math.exp(u) * torch.linalg.inv(C + math.exp(2 * u) * EYE)
        return float((A @ (x - M)).square().sum() + (EYE - math.exp(u) * A).square().sum())

    for x, diffusion in zip(X[:2], got.diffusion, strict=False):
        want = quad(excess, math.log(r0), math.log(rT), args=(x,), epsabs=1e-10, epsrel=1e-9)[0]
        assert diffusion.item() == pytest.approx(want, rel=1e-7)
    assert got.reconstruction.tolist() == pytest.approx([1.5 * math.log(2 * math.pi * math.e * r0**2)] * 4)
    exact = bounds(FULL.score(sde), sde, X, FULL, prior=FULL, calls=4, noise=Streams(0, 4))
    want = kl_divergence(at_T, MultivariateNormal(a * M, a**2 * C + s**2 * EYE))
    torch.testing.assert_close(exact.prior, want, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(exact.total, smoothed(X, r0), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(exact.total, exact.prior + exact.diffusion + exact.reconstruction)
    torch.testing.assert_close(got.immse, -MultivariateNormal(M, C).log_prob(X), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["VP", "VE", "DiscreteVP"])
def test_another_reference_changes_the_error_only(name):
    """The integral of one Gaussian's score beside another's: same diffusion within 4 standard errors of 0.05 nats."""
    sde = SDES[name]
    own = bounds(FULL.score(sde), sde, X, FULL, calls=4, noise=Streams(0, 4))
    got = bounds(rowwise(FULL.score(sde)), sde, X, OTHER, calls=16384, noise=Streams(1, 4))
    assert got.error.max() < 0.05
    assert ((got.diffusion - own.diffusion).abs() < 4 * got.error).all()


def test_forms_of_a_reference_are_one():
    """Full, low-rank and diagonal covariances of one Gaussian; low rank has a floor of multiplicity D - R."""
    sde, score = VP(), FULL.score(VP())
    factor = tensor([[0.5], [-0.2], [0.1]])
    low, full = gaussian(M, factor=factor, var=0.3), gaussian(M, cov=factor @ factor.T + 0.3 * EYE)
    round_, diagonal, same = (gaussian(M, **k) for k in ({"var": 0.3}, {"var": tensor([0.3] * 3)}, {"cov": 0.3 * EYE}))
    for one, others in ((low, [full]), (round_, [diagonal, same])):
        want = bounds(score, sde, X, one, prior=one, calls=32, noise=Streams(0, 4))
        for other in others:
            got = bounds(score, sde, X, other, prior=other, calls=32, noise=Streams(0, 4))
            torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-9, atol=1e-9)


def textures():
    """8 x 8 fields: three components of full covariance, smooth at different scales."""
    i = torch.arange(64, dtype=F64)
    covs = torch.stack(
        [0.5 * rho ** (i[:, None] - i).abs() + 0.05 * torch.eye(64, dtype=F64) for rho in (0.5, 0.8, 0.9)]
    )
    return mixture(torch.ones(3), 0.3 * Streams(5, 3)(torch.empty(3, 8, 8, dtype=F64)), covs=covs)


MIXTURES = {  # target, calls, largest standard error in nats
    "1-D": (mixture(tensor(0.3, 0.7), tensor([[-1.0], [0.8]]), var=tensor(0.1, 0.04)), 8192, 0.08),
    "2-D": (
        mixture(tensor(0.3, 0.7), tensor([[-1.0, 0.5], [0.8, -0.4]]), var=tensor([[0.05, 0.2], [0.3, 0.1]])),
        4096,
        0.05,
    ),
    "64-D": (textures(), 1024, 0.3),
}


@pytest.mark.parametrize("case", MIXTURES)
@pytest.mark.parametrize("sde", [EDM(), VP()], ids=["EDM", "VP"])
def test_mixture(case, sde):
    """Bound with the data's Gaussian as prior, and I-MMSE: -log p within 4 standard errors, which are small."""
    target, calls, most = MIXTURES[case]
    x, normal = target.sample(8, 3), moments(target)
    got = bounds(rowwise(target.score(sde)), sde, x, normal, prior=normal, calls=calls, noise=Streams(0, 8))
    want = -target.log_prob(x)
    assert got.error.max() < most
    for value in (got.total, got.immse):
        assert ((value - want).abs() < 4 * got.error).all()


def test_bound_of_the_smoothed_density():
    """At a coarse r_0 total is -E log p_r0(x + r_0 eps), by quadrature; stopping at t is what sets it."""
    sde, (target, _, _) = EDM(), MIXTURES["1-D"]
    x, normal, r0 = tensor([[-0.9], [0.1], [1.2]]), moments(target), 0.4
    got = bounds(rowwise(target.score(sde)), sde, x, normal, t=r0, prior=normal, calls=4096, noise=Streams(0, 3))
    y = tensor([quad(lambda e, c=c: cost(target, sde, c, r0, e), -9, 9, epsabs=1e-10)[0] for c in x.flatten().tolist()])
    assert got.error.max() < 0.02
    assert ((got.total - y).abs() < 4 * got.error).all()
    assert ((y + target.log_prob(x)).abs() > 0.1).all()


def cost(target, sde, x, r, e):
    log_p = target.log_prob(tensor([[x + r * e]]), sde, tensor(r))
    return -float(log_p) * math.exp(-0.5 * e * e) / math.sqrt(2 * math.pi)


def test_standard_errors_are_honest():
    """Of 600 repeats on one point 93 to 97 % lie within 1.96 standard errors, their spread is the error, and their mean
    -log p within 4 standard errors of its own, 0.008 nats."""
    sde, (target, _, _) = EDM(), MIXTURES["2-D"]
    n, x = 600, tensor([[0.1, 0.3]])
    score = rowwise(target.score(sde))
    got = bounds(score, sde, x.expand(n, 2), moments(target), calls=512, noise=Streams(7, n), chunk=32768)
    off = got.immse + target.log_prob(x)
    assert 0.93 < ((off / got.error).abs() < 1.96).double().mean() < 0.97
    assert got.immse.std().item() == pytest.approx(got.error.square().mean().sqrt().item(), rel=0.1)
    assert off.mean().abs() < 4 * got.immse.std() / math.sqrt(n) < 4 * 0.008


def test_where_the_network_is_asked():
    """Two states in each of 2500 strata of the density of log r in the docstring, whose CDF is by quadrature here."""
    sde, times = EDM(), []
    normal = gaussian(tensor([0.3, 0.3]), var=tensor([0.04, 1.5]))

    def score(x, t):
        times.append(t)
        return -x

    bounds(rowwise(score), sde, torch.zeros(1, 2, dtype=F64), normal, calls=5000, noise=Streams(0, 1), chunk=5000)
    u = torch.cat(times).log()
    fine = torch.linspace(math.log(0.002), math.log(80.0), 20001, dtype=F64)
    r2, c = torch.exp(2 * fine)[:, None], tensor([0.04, 1.5])
    parts = [(c / (c + r2)).sum(1), (c * r2 / (c + r2) ** 2).sum(1), torch.ones_like(fine)]
    density = sum(w * f / torch.trapezoid(f, fine) for w, f in zip((0.4, 0.4, 0.2), parts, strict=True))
    cdf = torch.cumulative_trapezoid(density, fine)
    at = cdf[((u - fine[0]) / (fine[1] - fine[0])).long().clamp(max=len(cdf) - 1)]
    middle = (torch.arange(2500).repeat_interleave(2) + 0.5) / 2500
    assert (at - middle).abs().max() < 0.5 / 2500 + 2e-4


def test_a_scaled_score_costs_its_error():
    """(1 + a) s on Gaussian data: the mean rises by a^2/2 sum [log(c + r^2)], and item by item as drawn."""
    sde, a, n = VP(), 0.1, 2000
    x, score = FULL.sample(n, 1), FULL.score(VP())
    runs = [
        bounds(rowwise(s), sde, x, FULL, calls=32, noise=Streams(2, n))
        for s in (score, lambda x, t: (1 + a) * score(x, t))
    ]
    rise = runs[1].total - runs[0].total
    c = torch.linalg.eigvalsh(C)
    want = 0.5 * a**2 * torch.log((c + ratio(sde, sde.T) ** 2) / (c + ratio(sde, sde.t_min) ** 2)).sum()
    error = rise.std() / math.sqrt(n)
    assert error < 0.1 * want
    assert (rise.mean() - want).abs() < 4 * error


def test_a_shifted_score_costs_its_error():
    """The score of N(m + b, C): the mean rises by 1/2 b'[(C + r^2)^-1]b, exactly, because the mean of the rise over the
    data is its value at x = m (it is linear in x)."""
    sde, b = EDM(), tensor(0.3, -0.2, 0.5)
    wrong = gaussian(M + b, cov=C)
    at_mean = M[None]
    good = bounds(FULL.score(sde), sde, at_mean, FULL, calls=4, noise=Streams(0, 1))
    bad = bounds(wrong.score(sde), sde, at_mean, wrong, calls=4, noise=Streams(0, 1))
    ends = [b @ torch.linalg.solve(C + ratio(sde, t) ** 2 * EYE, b) for t in (sde.t_min, sde.T)]
    want = 0.5 * (ends[0] - ends[1])
    torch.testing.assert_close(bad.total - good.total, want[None], rtol=1e-8, atol=1e-8)
    x = FULL.sample(500, 3)
    got = bounds(wrong.score(sde), sde, x, FULL, calls=64, noise=Streams(1, 500))
    clean = bounds(FULL.score(sde), sde, x, FULL, calls=64, noise=Streams(1, 500))
    rise = got.total - clean.total
    assert (rise.mean() - want).abs() < 4 * rise.std() / math.sqrt(500)
    assert rise.std() / math.sqrt(500) < 0.1 * want


LEVELS, LOW, HIGH = 9, -2.25, 2.25
W = (HIGH - LOW) / LEVELS


def cells(target):
    """Centres (n, D) of all cells of a diagonal mixture and their masses by the error function, ends open."""
    edges = LOW + W * torch.arange(1, LEVELS, dtype=F64)
    std = (target.eig.sqrt() if target.eig.shape[1] else target.floor.sqrt()[:, None]).expand(target.means.shape)
    cdf = 0.5 * (1 + torch.erf((edges - target.means[..., None]) / (std[..., None] * math.sqrt(2))))  # (K, D, L - 1)
    one, zero = torch.ones_like(cdf[..., :1]), torch.zeros_like(cdf[..., :1])
    mass = torch.cat([zero, cdf, one], 2).diff(dim=2)  # (K, D, L)
    D = target.means.shape[1]
    index = torch.tensor(list(itertools.product(range(LEVELS), repeat=D)))
    joint = torch.stack([mass[:, d, index[:, d]] for d in range(D)]).prod(0)  # (K, n)
    return LOW + (index + 0.5) * W, target.log_weights.exp() @ joint


@pytest.mark.parametrize("case", ["1-D", "2-D"])
def test_quantised_mixture(case):
    """All cells of a quantised mixture.  With its exact score and r_0 = w/10 total is -log of a cell's mass within 4
    standard errors; with a coarse r_0, or the score of the density before quantisation, its mean is well above the
    entropy; never 3 standard errors below."""
    target = MIXTURES[case][0]
    x, p = cells(target)
    keep = p > 1e-6
    x, p = x[keep], p[keep] / p[keep].sum()
    entropy, normal = -(p * p.log()).sum(), moments(mixture(p, x, var=torch.full((len(p),), W**2 / 12, dtype=F64)))
    sde, bins = EDM(), (LEVELS, LOW, HIGH)
    exact = mixture(p, x, var=torch.zeros(len(p), dtype=F64)).score(sde)

    def run(score, t, calls=512):
        noise = Streams(4, len(x))
        got = bounds(rowwise(score), sde, x, normal, t=t, bins=bins, prior=normal, calls=calls, noise=noise)
        return got, (p * got.total).sum() - entropy, (p**2 * got.error**2).sum().sqrt()

    got, gap, error = run(exact, W / 10, 4096)
    assert ((got.total + p.log()).abs() < 4 * got.error).all()
    assert gap.abs() < 3 * error < 0.12
    assert got.reconstruction.max() < 2e-6 * x.shape[1]
    for score, t in ((exact, 0.4), (target.score(sde), 0.05), (target.score(sde), 0.1), (target.score(sde), 0.2)):
        _, gap, error = run(score, t)
        assert gap > 0.05 + 3 * error


@pytest.mark.parametrize(("t", "levels"), [(0.05, 9), (0.3, 9), (2.0, 9), (0.3, 300), (0.3, 1)])
def test_softmax_decoder_by_quadrature(t, levels):
    """reconstruction = E[-log softmax over all centres of log N(x_t; centre, r_0^2)], at the ends and inside."""
    sde, width = EDM(), 0.5
    low, k = -1.0, sorted({0, levels // 2, levels - 1})
    centres = low + width * (torch.arange(levels, dtype=F64) + 0.5)
    x = centres[k][:, None]
    got = bounds(FULL1.score(sde), sde, x, FULL1, t=t, bins=(levels, low, low + width * levels), calls=4)

    def integrand(e, c):
        log_p = -0.5 * ((c + t * e - centres) / t) ** 2
        return float(log_p.logsumexp(0) + 0.5 * e * e) * math.exp(-0.5 * e * e) / math.sqrt(2 * math.pi)

    want = [quad(integrand, -10, 10, args=(c,), epsabs=1e-11, limit=500)[0] for c in x.flatten().tolist()]
    assert got.reconstruction.tolist() == pytest.approx(want, abs=1e-8)


FULL1 = gaussian(tensor([0.2]), var=0.5)


def test_affine_identities():
    """c x under c sigma costs log c a dimension more as a density, nothing as bins; x + b costs nothing."""
    (target, _, _), c, b = MIXTURES["2-D"], 2.5, tensor(0.7, -3.0)
    x, bins = tensor([[0.25, -0.75], [-1.25, 0.75]]), (8, -2.0, 2.0)

    def run(c, b, bins, quantised=False):
        moved = mixture(target.log_weights.exp(), c * target.means + b, var=c**2 * target.eig)
        sde, normal = EDM(T=80 * c, t_min=0.002 * c), moments(moved)
        return bounds(
            moved.score(sde),
            sde,
            c * x + b,
            normal,
            prior=normal,
            bins=bins if quantised else None,
            calls=16,
            noise=Streams(0, 2),
        )

    want, shift = run(1.0, 0.0, bins), 2 * math.log(c)
    got = run(c, b, bins)
    torch.testing.assert_close(got.total, want.total + shift)
    torch.testing.assert_close(got.immse, want.immse + shift)
    torch.testing.assert_close(got.error, want.error)
    got = run(c, 0.0, (8, -2 * c, 2 * c), True)
    torch.testing.assert_close(got.total, run(1.0, 0.0, bins, True).total)


class Labelled:
    """A score that holds a label for each row."""

    def __init__(self, labels, seen=None):
        self.labels, self.seen = labels, [] if seen is None else seen

    def __call__(self, x, t):
        self.seen.append(len(x))
        s = torch.stack([self.score(k, x, t) for k in range(2)])
        return s[self.labels, torch.arange(len(x))]

    def score(self, k, x, t):
        return gaussian(tensor([[-1.0, 0.5], [0.8, -0.4]][k]), var=0.3).score(VP())(x, t)

    def rows(self, index):
        return Labelled(self.labels[index], self.seen)


def test_alone_in_a_batch_and_in_any_chunks():
    """And with rows or without, with each row's own label."""
    sde, normal, labels = VP(), moments(MIXTURES["2-D"][0]), torch.tensor([0, 1, 1, 0, 1])
    x = 2 * Streams(1, 5)(torch.empty(5, 2, dtype=F64))
    x[4] *= 100
    held = Labelled(labels)
    score = counted(lambda x, t: held(x, t))  # without rows
    whole = bounds(score, sde, x, normal, calls=32, noise=Streams(3, 5))
    assert (score.calls, score.samples) == (32, 160)
    for chunk, rows in ((1, 5), (25, 25), (59, 55), (1024, 160)):
        seen = []
        got = bounds(Labelled(labels, seen), sde, x, normal, calls=32, noise=Streams(3, 5), chunk=chunk)
        assert (max(seen), sum(seen)) == (rows, 160)
        torch.testing.assert_close(tuple(got), tuple(whole), rtol=1e-9, atol=1e-12)
    for i in (0, 2, 4):
        noise = Streams(3, range(i, i + 1))
        alone = bounds(Labelled(labels[i : i + 1]), sde, x[i : i + 1], normal, calls=32, noise=noise)
        torch.testing.assert_close(tuple(alone), tuple(v[i : i + 1] for v in whole), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (1, 3, 1, 1)])
def test_any_shape_and_single_precision(shape):
    sde, knobs = VP(), {"calls": 32, "noise": None}
    flat = bounds(FULL.score(sde), sde, X, OTHER, prior=FULL, **(knobs | {"noise": Streams(0, 4)}))
    deep, other = gaussian(M.reshape(shape), cov=C), gaussian(OTHER.means[0].reshape(shape), cov=OTHER.eig[0].diag())
    x = X.reshape(4, *shape)
    got = bounds(deep.score(sde), sde, x, other, prior=deep, **(knobs | {"noise": Streams(0, 4)}))
    torch.testing.assert_close(tuple(got), tuple(flat), rtol=1e-9, atol=1e-9)
    same = lambda z: Streams(0, 4)(z.double()).to(z)  # noqa: E731
    draws = [Streams(0, 4), Streams(0, 4)]
    single = bounds(
        deep.score(sde), sde, x.float(), other, prior=deep, calls=32, noise=lambda z: draws[0](z.double()).to(z)
    )
    assert single.total.dtype == torch.float32
    torch.testing.assert_close(tuple(v.double() for v in single), tuple(flat), rtol=1e-4, atol=1e-3)
    ts = sde.T * tensor(1.0, 0.5, 0.1)
    want = chain_bound(FULL.score(sde), sde, X, ts, noise=same)
    got = chain_bound(deep.score(sde), sde, x, ts, noise=same)
    torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-9, atol=1e-9)
    single = chain_bound(deep.score(sde), sde, x.float(), ts, noise=same)
    torch.testing.assert_close(tuple(v.double() for v in single), tuple(want), rtol=1e-4, atol=1e-3)


def test_no_graph_is_kept():
    x, w = X.clone().requires_grad_(), tensor(1.0).requires_grad_()
    score = lambda x, t: w * FULL.score(VP())(x, t)  # noqa: E731
    for got in (bounds(score, VP(), x, FULL, calls=4), chain_bound(score, VP(), x, tensor(1.0, 0.5))):
        assert not any(v.requires_grad for v in got)


def test_bad_input():
    sde, x, run = VP(), X, (FULL.score(VP()), VP())
    ok = tensor([[0.25, -0.75, 0.25]])
    bins = (4, -1.0, 1.0)
    ts = tensor(1.0, 0.5)
    for match, call in {
        "float32 or float64": lambda: bounds(*run, x.long(), FULL),
        r"x\[None\]": lambda: chain_bound(*run, x[0], ts),
        "one Gaussian": lambda: bounds(*run, x, mixture(torch.ones(2), X[:2], var=tensor(1.0, 1.0))),
        "prior must be one Gaussian": lambda: bounds(*run, x, FULL, prior=mixture(torch.ones(2), X[:2])),
        "the reference's are": lambda: bounds(*run, x[:, :2], FULL),
        "no density": lambda: bounds(*run, x, gaussian(M, factor=tensor([[1.0], [0.0], [0.0]]))),
        "even and at least 4": lambda: bounds(*run, x, FULL, calls=7),
        "below T": lambda: bounds(*run, x, FULL, t=1.0),
        "at t = 0": lambda: bounds(*run, x, FULL, t=0.0),
        "bin centres": lambda: bounds(*run, x, FULL, bins=bins),
        "0.2 w off": lambda: chain_bound(*run, ok + 0.1, ts, bins=bins),
        "a value 0.2 w": lambda: bounds(*run, ok - 0.1, FULL, bins=bins),
        "k < 4": lambda: chain_bound(*run, ok + 1, ts, bins=bins),
        "low < high": lambda: chain_bound(*run, ok, ts, bins=(4, 1.0, -1.0)),
        "decreasing": lambda: chain_bound(*run, x, ts.flip(0)),
        "at least two": lambda: chain_bound(*run, x, ts[:1]),
        "'small'": lambda: chain_bound(*run, x, ts, variance="learned"),
        "like its argument": lambda: bounds(lambda x, t: x[:, :1], sde, x, FULL),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(FloatingPointError, match="sample 2"):
        chain_bound(lambda x, t: x / (x.abs().amax(1, keepdim=True) < 1e4), sde, torch.cat([X[:2], 1e9 * X[2:]]), ts)
    with pytest.raises(FloatingPointError, match="sample 2"):
        bounds(lambda x, t: x / (x.abs().amax(1, keepdim=True) < 1e4), sde, torch.cat([X[:2], 1e9 * X[2:]]), FULL)
    bounds(*run, ok, FULL, bins=bins)
