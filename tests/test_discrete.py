"""Code lengths against cell masses counted by the error function, and draws against 300 digits."""

import math

import mpmath as mp
import pytest
import torch
from scipy.special import log_ndtr
from sklearn.datasets import load_digits
from truth import F64, tensor

from scoresde import VE, VP, Straight, Streams, gaussian, log_prob, mixture
from scoresde.discrete import (
    bits_per_dim,
    code_length,
    dequantize,
    fitted,
    importance_bound,
    noise_bias,
    truncated,
    truncated_normal,
    uniform,
)


class Separable:
    """prod_d sum_k w_dk N(x_d; m_dk, v_dk), its score and the mass of a cell, from the definitions."""

    def __init__(self, w, m, v):
        self.w, self.m, self.v = w, m, v

    def parts(self, x):
        return self.w.log() - (x[..., None] - self.m) ** 2 / (2 * self.v) - (2 * math.pi * self.v).log() / 2

    def log_prob(self, x):
        return self.parts(x).logsumexp(-1).sum(1)

    def score(self, x, t=None):
        return -(self.parts(x).softmax(-1) * (x[..., None] - self.m) / self.v).sum(-1)

    def log_mass(self, c, w):
        return (self.w.log() + log_cdf_difference(c[..., None], w, self.m, self.v)).logsumexp(-1).sum(1)

    def levels(self, n, levels, low, high, seed=0):
        """n items drawn from it and quantised; what lies outside the range goes to the nearest level."""
        g = torch.Generator().manual_seed(seed)
        D = len(self.m)
        i = torch.multinomial(self.w, n, replacement=True, generator=g).T  # (n, D)
        d = torch.arange(D)
        x = self.m[d, i] + self.v[d, i].sqrt() * torch.randn(n, D, generator=g, dtype=F64)
        return ((x - low) * levels / (high - low)).floor().clamp(0, levels - 1)


def log_cdf_difference(c, w, m, v):
    """log of the mass of N(m, v) in [c - w/2, c + w/2], by scipy; the upper tail is turned to the lower."""
    a, b = (c - w / 2 - m) / v**0.5, (c + w / 2 - m) / v**0.5
    a, b = torch.where(a > 0, -b, a), torch.where(a > 0, -a, b)
    la, lb = (torch.from_numpy(log_ndtr(q.numpy())) for q in (a, b))
    return lb + torch.log(-torch.expm1(la - lb))


def digits():
    """Each of 64 pixels of scikit-learn's digits on its own: ten classes' means and variances, pixels in [-1, 1]."""
    x, y = (torch.as_tensor(q) for q in load_digits(return_X_y=True))
    x = -1 + (x + 0.5) * 2 / 17
    classes = [x[y == c] for c in range(10)]
    w = tensor([len(c) / len(x) for c in classes]).expand(64, 10)
    m, v = torch.stack([c.mean(0) for c in classes], 1), torch.stack([c.var(0) for c in classes], 1)
    return Separable(w, m, v + (2 / 17) ** 2 / 12)


DIGITS = digits()
LINE = Separable(tensor([[0.4, 0.6]]), tensor([[-0.5, 0.4]]), tensor([[0.01, 0.03]]))
PLANE = mixture(tensor(0.3, 0.7), tensor([[-0.5, 0.2], [0.4, -0.3]]), var=tensor([[0.02, 0.05], [0.06, 0.03]]))


def plane_mass(c, w):
    parts = log_cdf_difference(c[:, None], w, PLANE.means, PLANE.eig).sum(-1)
    return (PLANE.log_weights + parts).logsumexp(-1)


def plane_levels(n, levels, low, high):
    return ((PLANE.sample(n) - low) * levels / (high - low)).floor().clamp(0, levels - 1)


NOW = VE(sigma_min=1e-6)  # alpha = 1: the data's own density, its score at any time
PROBLEMS = {  # log p, score, log mass, items, levels, low, high
    "1-D": (LINE.log_prob, LINE.score, LINE.log_mass, LINE.levels, 12, -1.5, 1.5),
    "2-D": (PLANE.log_prob, PLANE.score(NOW), plane_mass, plane_levels, 10, -1.5, 1.5),
    "64-D, 17 levels": (DIGITS.log_prob, DIGITS.score, DIGITS.log_mass, DIGITS.levels, 17, -1.0, 1.0),
    "64-D, 256 levels": (DIGITS.log_prob, DIGITS.score, DIGITS.log_mass, DIGITS.levels, 256, -1.0, 1.0),
}


def errors(name, dequantizer, B=400, N=20, seed=0):
    """Bound less truth of B items at K = 1, 5, 20: (3, B)."""
    logp, score, mass, items, levels, low, high = PROBLEMS[name]
    k = items(B, levels, low, high)
    q = {"uniform": uniform, "fitted": lambda: fitted(score, NOW)}[dequantizer]()
    code = code_length(logp, k, levels, low, high, K=N, dequantizer=q, noise=Streams(seed, B))
    w = (high - low) / levels
    truth = mass(low + (k + 0.5) * w, w)
    return torch.stack([importance_bound(code.terms, K) - truth for K in (1, 5, 20)])


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_bound_reaches_the_mass(name):
    """Without - log K it would lie 3 nats above."""
    e = errors(name, "fitted")
    mean, se = e.mean(1), e.std(1) / e.shape[1] ** 0.5
    assert (se < 0.005).all()
    assert abs(mean[2]) <= 0.02
    assert (mean <= 3 * se).all()
    assert (e.diff(dim=0) >= -1e-12).all()  # monotone in K, item by item


@pytest.mark.parametrize(("name", "most"), [("1-D", 0.02), ("2-D", 0.02), ("64-D, 256 levels", 0.01)])
def test_the_uniform_bound_where_cells_are_small(name, most):
    e = errors(name, "uniform", B=4000 if name != "64-D, 256 levels" else 400)
    mean, se = e.mean(1), e.std(1) / e.shape[1] ** 0.5
    assert mean[0] < -5 * se[0]
    assert abs(mean[2]) <= most
    assert (mean <= 3 * se).all()
    assert (e.diff(dim=0) >= -1e-12).all()


def test_the_uniform_bound_is_loose_in_many_dimensions():
    """One draw of the fitted q is closer than twenty uniform ones."""
    loose, close = errors("64-D, 17 levels", "uniform"), errors("64-D, 17 levels", "fitted")
    assert loose[2].mean() < -0.2
    assert close[0].mean() > -0.03


@pytest.mark.parametrize("sde", [VP(), Straight()], ids=["VP", "Straight"])
@pytest.mark.parametrize("kind", ["truncated_normal", "fitted"])
def test_integers_noised_by_the_forward_process(sde, kind):
    """Data on the centres, and a density that peaks there with the noise of time t (six of it a cell): the mass of a
    cell by the error function, alpha and its 64-D log-determinant (5 nats for Straight) and all.  A uniform q fails."""
    levels, D, w = 4, 64, 0.5
    t = sde.time(tensor(w / 6).log().neg())
    a, s = sde.alpha(t), sde.sigma(t)
    centres = tensor([-0.75, -0.25, 0.25, 0.75])
    share = torch.rand(D, levels, generator=torch.Generator().manual_seed(2), dtype=F64) + 0.1
    share = share / share.sum(1, keepdim=True)
    noised = Separable(share, (a * centres).expand(D, levels), (s**2).expand(D, levels))
    k = torch.multinomial(share, 100, replacement=True, generator=torch.Generator().manual_seed(3)).T
    truth = noised.log_mass(a * centres[k], a * w)
    q = truncated_normal(sde, t) if kind == "truncated_normal" else fitted(noised.score, sde, t)
    run = {"K": 20, "noise": Streams(0, 100)}
    e = code_length(noised.log_prob, k.double(), levels, -1.0, 1.0, dequantizer=q, **run).terms - truth
    e = torch.stack([importance_bound(e, K) for K in (1, 5, 20)])
    assert abs(e[2].mean()) <= 0.02
    assert (e.mean(1) <= 3 * e.std(1) / 10).all()
    loose = code_length(noised.log_prob, k.double(), levels, -1.0, 1.0, dequantizer=uniform(sde, t), **run)
    assert (loose.log_mass - truth).mean() < -5


@pytest.mark.parametrize("g", [0.1, 30.0, -1000.0, 1e5])
def test_steep_slopes(g):
    """p = exp(g y) over cells of width 1: all of the mass may lie within 1e-5 of an edge."""
    k = torch.arange(8)[:, None].repeat(10, 1).double()
    q = fitted(lambda y, t: torch.full_like(y, g), NOW)
    code = code_length(lambda y: g * y[:, 0], k, 8, 0.0, 8.0, K=20, dequantizer=q, noise=Streams(0, 80))
    edge = k[:, 0] + (1 if g > 0 else 0)
    truth = g * edge + math.log(-math.expm1(-abs(g)) / abs(g))
    assert (code.terms - truth).abs().max() < 0.1
    assert abs((code.log_mass - truth).mean()) < 1e-3


def test_draws_of_a_cut_normal():
    """Quantile and density by mpmath, through the centre and both tails, narrow and wide; float32 noise, too."""
    with mp.workdps(300):
        for mean, std, width in [
            (0, 1, 6),
            (0, 1, 1e-3),
            (0, 1e-2, 1),
            (9, 0.3, 1),
            (-9, 0.3, 1),
            (0.4, 0.1, 1),
            (0, 5, 40),
        ]:
            a, b = ((s * mp.mpf(width) / 2 - mp.mpf(mean)) / mp.mpf(std) for s in (-1, 1))
            inner = mp.erfc(a / mp.sqrt(2)) / 2 - mp.erfc(b / mp.sqrt(2)) / 2
            for z in (-8.0, -3.0, -0.5, 0.0, 0.7, 4.0, 8.0):
                v, log_q = truncated(tensor([z]), tensor([float(mean)]), tensor([float(std)]), width)
                e = (mp.mpf(v.item()) - mean) / mp.mpf(std)
                below = (mp.erfc(a / mp.sqrt(2)) / 2 - mp.erfc(e / mp.sqrt(2)) / 2) / inner
                above = (mp.erfc(e / mp.sqrt(2)) / 2 - mp.erfc(b / mp.sqrt(2)) / 2) / inner
                small = min(below, above)
                want = mp.erfc(abs(mp.mpf(z)) / mp.sqrt(2)) / 2
                near = mp.mpf(1) / 2 if a * b < 0 else mp.erfc(min(abs(a), abs(b)) / mp.sqrt(2)) / 2
                room = 4e-16 * ((abs(mean) + width) * mp.exp(log_q.item()) + near / inner)  # v, Phi have 53 bits
                assert abs(small - want) <= 1e-9 * want + room, (mean, std, width, z)
                assert (below < above) == (z < 0) or z == 0
                exact = -(e**2) / 2 - mp.log(mp.mpf(std) * mp.sqrt(2 * mp.pi) * inner)
                assert log_q.item() == pytest.approx(float(exact), rel=1e-11, abs=1e-11)
    v, log_q = truncated(torch.tensor([-6.0, 6.0]), torch.zeros(2), torch.full((2,), 0.02), 1.0)
    torch.testing.assert_close(v, tensor(-0.12, 0.12), rtol=1e-5, atol=0)


def test_draws_are_repeatable_nested_and_in_their_cells():
    k = torch.tensor([[0, 3, 16], [16, 8, 2], [5, 5, 5]])
    small = gaussian(tensor(0.1, -0.2, 0.3), cov=tensor([[0.04, 0.03, 0.0], [0.03, 0.04, 0.01], [0.0, 0.01, 0.02]]))
    seen = []

    def logp(y):
        seen.append(y)
        return small.log_prob(y).to(y)

    for q in (uniform(), truncated_normal(NOW, 1e-3), fitted(small.score(NOW), NOW)):
        seen.clear()

        def run(k, K, rows, q=q):
            return code_length(logp, k, 17, -1.0, 1.0, K=K, dequantizer=q, noise=Streams(7, rows)).terms

        whole = run(k.double(), 7, 3)
        assert torch.equal(run(k.double(), 3, 3), whole[:3])
        assert torch.equal(run(k[1:2].double(), 7, [1]), whole[:, 1:2])
        assert (torch.stack(seen[:7]) - (-1 + (k + 0.5) * 2 / 17)).abs().max() <= 1 / 17 + 1e-9
        assert len({row[0, 0].item() for row in seen[:7]}) == 7
        seen.clear()
        single = run(k.float(), 7, 3)
        assert seen[0].dtype == torch.float32
        assert single.dtype == F64
        assert single.isfinite().all()


def test_any_shape_is_the_flattened_problem():
    k = DIGITS.levels(3, 17, -1.0, 1.0)
    flat = code_length(DIGITS.log_prob, k, 17, -1, 1, K=2, dequantizer=fitted(DIGITS.score, NOW), noise=Streams(0, 3))

    def score(y, t):
        return DIGITS.score(y.flatten(1)).reshape(y.shape)

    image = code_length(
        lambda y: DIGITS.log_prob(y.flatten(1)), k.reshape(3, 1, 8, 8), 17, -1, 1, K=2,
        dequantizer=fitted(score, NOW), noise=Streams(0, 3),
    )  # fmt: skip
    torch.testing.assert_close(image.terms, flat.terms, rtol=1e-12, atol=0)
    torch.testing.assert_close(image.bits_per_dim, -image.log_mass / (64 * math.log(2)))


def test_two_calls_of_the_score_and_K_of_the_density():
    calls = []

    def score(y, t):
        calls.append(float(t))
        return LINE.score(y)

    def density(y):
        calls.append("p")
        return LINE.log_prob(y)

    code_length(density, torch.tensor([[3], [4]]), 12, -1.5, 1.5, K=3, dequantizer=fitted(score, VP(), 0.25))
    assert calls == [0.25, 0.25, "p", "p", "p"]


def noisy(std, seed, B):
    """The digits' density with a Gaussian error that is fresh in each draw."""
    own = Streams(seed, B)
    return lambda y: DIGITS.log_prob(y) + std * own(y[:, :1])[:, 0]


@pytest.mark.parametrize("std", [0.5, 2.5, 6.9])
def test_noise_in_log_p_lifts_the_bound_by_no_more_than_is_said(std):
    """Nearly all of v (1 - 1/K)/2 where v is small; a second run measures v."""
    B = 400
    k, q = DIGITS.levels(B, 256, -1.0, 1.0), fitted(DIGITS.score, NOW)

    def run(density):
        return code_length(
            density, k, 256, -1.0, 1.0, K=20, dequantizer=q, noise=Streams(0, B), noise_std=torch.full((B,), std)
        )

    clean, a, b = run(DIGITS.log_prob), run(noisy(std, 10, B)), run(noisy(std, 20, B))
    gain = (a.log_mass + b.log_mass) / 2 - clean.log_mass
    se = gain.std() / B**0.5
    assert gain.mean() <= a.bias[0] + 3 * se
    assert gain.mean() >= {0.5: 0.95, 2.5: 0.7, 6.9: 0.5}[std] * a.bias[0] - 3 * se
    measured = (a.terms - b.terms).std(0).square().mean().sqrt() / 2**0.5
    assert measured.item() == pytest.approx(std, rel=0.02)


def test_an_error_common_to_the_draws_shifts_an_item_and_lifts_nothing():
    k, error = DIGITS.levels(5, 17, -1.0, 1.0), tensor(-3.0, 0.0, 1.0, 8.0, -20.0)
    clean, shifted = (
        code_length(lambda y, e=e: DIGITS.log_prob(y) + e, k, 17, -1.0, 1.0, K=20, noise=Streams(0, 5))
        for e in (0 * error, error)
    )
    torch.testing.assert_close(shifted.log_mass - clean.log_mass, error, rtol=0, atol=1e-12)
    assert clean.bias.tolist() == [0.0] * 5


def test_bound_of_the_noise_by_hand():
    assert noise_bias(0.5, 20).item() == pytest.approx(0.25 * 0.95 / 2)
    assert noise_bias(6.9, 20).item() == pytest.approx(6.9 * math.sqrt(2 * math.log(20)))
    assert noise_bias(6.9, 1).item() == 0
    torch.testing.assert_close(noise_bias(tensor(0.0, 1.0), 2), tensor(0.0, 0.25))


def midpoints(n, D):
    """A noise whose n^D calls are the midpoints of a cell, in each dimension n of them."""
    u = (torch.arange(n, dtype=F64) + 0.5) / n
    nodes = iter(torch.special.ndtri(torch.cartesian_prod(*[u] * D).reshape(-1, D)))
    return lambda like: next(nodes).expand_as(like)


@pytest.mark.parametrize("D", [1, 2])
def test_masses_of_all_cells_sum_to_one(D):
    """By the flow, with a quadrature in each cell and the whole mixture inside the range."""
    sde, t = VP(), tensor(0.05)
    target = PLANE if D == 2 else mixture(tensor(0.4, 0.6), tensor([[-0.5], [0.4]]), var=tensor(0.01, 0.03))
    levels, n = (24, 1) if D == 2 else (16, 3)
    k = torch.cartesian_prod(*[torch.arange(levels)] * D).reshape(-1, D).double()
    flow = {"t": t, "prior": lambda z: target.log_prob(z, sde, tensor(1.0)), "tol": 1e-4}

    def logp(y):
        return log_prob(target.score(sde), sde, y, **flow)

    code = code_length(logp, k, levels, -1.8, 1.8, K=n**D, dequantizer=uniform(sde, t), noise=midpoints(n, D))
    assert code.log_mass.exp().sum().item() == pytest.approx(1, abs=1e-3)
    assert torch.exp2(-D * code.bits_per_dim).sum().item() == pytest.approx(1, abs=1e-3)


def test_the_flow_under_the_bound():
    """Masses of 2-D cells by the ODE's density at time t."""
    sde, t, B = VP(), tensor(0.02), 24
    a, s = sde.alpha(t), sde.sigma(t)
    k, w = plane_levels(B, 10, -1.5, 1.5), 0.3
    v = a**2 * PLANE.eig + s**2
    c = a * (-1.5 + (k + 0.5) * w)
    truth = (PLANE.log_weights + log_cdf_difference(c[:, None], a * w, a * PLANE.means, v).sum(-1)).logsumexp(-1)
    score = PLANE.score(sde)
    flow = {"t": t, "prior": lambda z: PLANE.log_prob(z, sde, tensor(1.0)), "tol": 1e-4}
    knobs = {"K": 10, "dequantizer": fitted(score, sde, t), "noise": Streams(1, B)}
    code = code_length(lambda y: log_prob(score, sde, y, **flow), k, 10, -1.5, 1.5, **knobs)
    e = code.log_mass - truth
    assert abs(e.mean()) <= 0.02
    assert e.mean() <= 3 * e.std() / B**0.5


@pytest.mark.parametrize("c", [4.0, -0.5])
def test_scaling_the_data(c):
    """c x in the same bins costs log2|c| more a dimension, in bins that are scaled, too, nothing; to rounding."""
    big = Separable(DIGITS.w, c * DIGITS.m, c**2 * DIGITS.v)
    k = DIGITS.levels(5, 17, -1.0, 1.0)
    x = dequantize(k, 17, -1.0, 1.0, Streams(0, 5))
    before, after = bits_per_dim(DIGITS.log_prob(x), 64, 0.1), bits_per_dim(big.log_prob(c * x), 64, 0.1)
    torch.testing.assert_close(after - before, torch.full((5,), math.log2(abs(c)), dtype=F64), rtol=0, atol=1e-13)
    torch.testing.assert_close(bits_per_dim(big.log_prob(c * x), 64, 0.1 * abs(c)), before, rtol=0, atol=1e-13)
    mirrored = k if c > 0 else 16 - k
    noise, turned = Streams(3, 5), Streams(3, 5)
    for q, q1 in ((uniform(), uniform()), (fitted(DIGITS.score, NOW), fitted(big.score, NOW))):
        one = code_length(DIGITS.log_prob, k, 17, -1.0, 1.0, K=3, dequantizer=q, noise=noise)
        two = code_length(
            big.log_prob, mirrored, 17, -abs(c), abs(c), K=3, dequantizer=q1,
            noise=turned if c > 0 else lambda y: -turned(y),
        )  # fmt: skip
        torch.testing.assert_close(two.bits_per_dim, one.bits_per_dim, rtol=0, atol=1e-12)


def test_one_uniform_draw_is_the_plain_code_length():
    k = DIGITS.levels(4, 17, -1.0, 1.0)
    code = code_length(DIGITS.log_prob, k, 17, -1.0, 1.0, noise=Streams(0, 4))
    x = dequantize(k, 17, -1.0, 1.0, Streams(0, 4))
    torch.testing.assert_close(code.bits_per_dim, bits_per_dim(DIGITS.log_prob(x), 64, 2 / 17), rtol=1e-12, atol=0)


def test_a_flat_density_costs_log2_of_the_levels():
    """Any range, any width, exactly, whatever the draw."""
    k = torch.tensor([[0, 4], [2, 1]], dtype=torch.uint8)
    code = code_length(lambda y: torch.full((2,), -2 * math.log(30.0), dtype=F64), k, 5, -10.0, 20.0, K=4)
    torch.testing.assert_close(code.bits_per_dim, tensor(1.0, 1.0) * math.log2(5))


def test_small_and_half_numbers_become_the_default_dtype():
    for dtype in (torch.uint8, torch.int32, torch.bfloat16, torch.float16):
        assert dequantize(torch.tensor([[3, 1]], dtype=dtype), 4, 0.0, 1.0).dtype == torch.get_default_dtype()
    assert dequantize(torch.zeros(0, 3), 4, 0.0, 1.0).shape == (0, 3)


ITEM = torch.tensor([[1, 3]])
REFUSALS = {
    "fractions": (
        lambda: dequantize(ITEM / 2, 8, 0, 1),
        "integer levels, got fractions such as 0.5; undo any rescaling",
    ),
    "nan": (lambda: dequantize(ITEM * math.nan, 8, 0, 1), "integer levels, got fractions such as nan"),
    "above": (lambda: dequantize(ITEM, 3, 0, 1), r"0\.\.2 for levels = 3, got 1\.\.3; give the real number of levels"),
    "below": (lambda: code_length(LINE.log_prob, ITEM - 2, 3, 0, 1), r"0\.\.2 for levels = 3, got -1\.\.1"),
    "levels": (lambda: dequantize(ITEM, 0, 0, 1), "levels must be a whole number of at least 1, got 0"),
    "part levels": (lambda: dequantize(ITEM, 7.5, 0, 1), "levels must be a whole number of at least 1, got 7.5"),
    "range": (lambda: dequantize(ITEM, 8, 1, 1), "low must lie below high.*got 1 and 1"),
    "K": (lambda: code_length(LINE.log_prob, ITEM, 8, 0, 1, K=0), "K must be at least 1 draw, got 0"),
    "item": (lambda: code_length(LINE.log_prob, ITEM[0], 8, 0, 1), r"got shape \(2,\); one item is k\[None\]"),
    "D": (lambda: bits_per_dim(tensor(1.0), 0, 0.1), "at least 1, got 0"),
    "bin": (lambda: bits_per_dim(tensor(1.0), 3, math.inf), "bin_width must be positive, got inf; take"),
    "values": (lambda: code_length(lambda y: y, ITEM, 8, 0, 1), r"nats of shape \(1,\).*got \(1, 2\)"),
    "groups": (lambda: importance_bound(torch.zeros(4, 1), 3), "K must divide the number of draws, 4, got 3"),
    "half a time": (lambda: uniform(t=0.1), "give the SDE along with t = 0.1"),
    "time": (lambda: truncated_normal(VP(), 0.0), r"t must lie in \(0"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case):
    call, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_density_is_not_averaged_away(value):
    with pytest.raises(FloatingPointError, match=f"item 1: log p is {value} and"):
        code_length(lambda y: tensor(0.0, value), torch.zeros(2, 1), 8, 0, 1)
    none = code_length(lambda y: tensor(0.0, -math.inf), torch.zeros(2, 1), 8, 0.0, 8.0)
    assert none.log_mass.tolist() == [0.0, -math.inf]  # no mass is an answer
