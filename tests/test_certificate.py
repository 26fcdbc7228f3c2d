"""What a guided flow or chain really samples, against Gaussians, where everything is known."""

import math

import pytest
import torch
from scipy.integrate import solve_ivp
from truth import F64, Draws, gaussian_score, log_snr_grid, marginal, moments, tensor

import guidance
from experiments import certificate as study
from experiments import certificate_model as network
from guidance.certificate import certify
from samplers import ancestral, euler_maruyama, girsanov, kernels
from scoresde import EDM, VP, Model, Streams, gaussian, mixture
from scoresde.checkpoint import save_model
from scoresde.nets import UNet

SDE, T0 = VP(), 0.01
MEAN, VAR, WIDE = 0.6, 0.8, 1.2  # a class N(MEAN, VAR) inside N(0, WIDE), in each dimension


def rule(w):
    return guidance.cfg(gaussian_score(SDE, MEAN, VAR), gaussian_score(SDE, 0.0, WIDE), w)


def tilted(w, t=T0):
    """Mean and variance of p_c^w p_u^(1-w) at t, in each dimension, and log of its integral."""
    (m, v), (m1, v1) = marginal(SDE, t, 0.0, WIDE), marginal(SDE, t, MEAN, VAR)
    precision = w / v1 + (1 - w) / v
    centre = (w * m1 / v1 + (1 - w) * m / v) / precision
    log_z = -0.5 * (w * (m1**2 / v1 + torch.log(2 * math.pi * v1)) + (1 - w) * (m**2 / v + torch.log(2 * math.pi * v)))
    return centre, 1 / precision, log_z + 0.5 * precision * centre**2 + 0.5 * torch.log(2 * math.pi / precision)


def sampled(w):
    """Mean and variance of what the guided flow makes of N(0, 1) at T: a linear ODE, by another program's solver."""

    def rhs(t, y):  # y = (mean, gain)
        (m, v), (m1, v1) = marginal(SDE, t, 0.0, WIDE), marginal(SDE, t, MEAN, VAR)
        slope, offset = float(w / v1 + (1 - w) / v), float(w * m1 / v1 + (1 - w) * m / v)
        f, g2 = float(SDE.drift(tensor(t))), float(SDE.diffusion(tensor(t))) ** 2
        return [(f + 0.5 * g2 * slope) * y[0] - 0.5 * g2 * offset, (f + 0.5 * g2 * slope) * y[1]]

    end = solve_ivp(rhs, (1.0, T0), [0.0, 1.0], method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    return tensor(end[0]), tensor(end[1] ** 2)


def divergence(w, D):
    """KL(q || pi) in D dimensions."""
    (m, v), (m1, v1, _) = sampled(w), tilted(w)
    return float(0.5 * D * (v / v1 + (m - m1) ** 2 / v1 - 1 - torch.log(v / v1)))


def log_tilted(w):
    def log_f(x):
        (m, v), (m1, v1) = marginal(SDE, T0, 0.0, WIDE), marginal(SDE, T0, MEAN, VAR)
        u, c = (torch.distributions.Normal(a, b.sqrt()).log_prob(x).sum(1) for a, b in ((m, v), (m1, v1)))
        return (1 - w) * u + w * c

    return log_f


def certificate(w, D, n, seed, **how):
    return certify(rule(w), SDE, Streams(seed, n)(torch.empty(n, D, dtype=F64)), log_tilted(w), t=T0, **how)


@pytest.mark.parametrize(("w", "D", "n"), [(2.0, 2, 4000), (3.0, 2, 8000), (1.3, 64, 4000)])
def test_divergence_in_closed_form(w, D, n):
    """KL to 0.01 nats; Z and the effective samples too.  One sign probe is the exact trace of these Jacobians."""
    how = {"method": "multistep", "steps": 64, "probes": 1, "kind": "rademacher"}
    got, want = certificate(w, D, n, 1, **how), divergence(w, D)
    m1, v1, log_z = tilted(w)
    assert got.kl_error < 0.01
    assert abs(got.kl - want) < 3 * got.kl_error + 1e-3
    x = Streams(1, n)(torch.empty(n, D, dtype=F64))
    known = certify(rule(w), SDE, x, lambda x: log_tilted(w)(x) - D * log_z, t=T0, normalised=True, **how)
    assert known.log_z == 0
    assert abs(known.kl - want) < 3 * known.kl_error + 1e-3
    weights = (got.log_w - D * log_z).exp()  # mean 1
    assert abs(float(weights.mean()) - 1) < 4 * float(weights.std()) / n**0.5 + 1e-3
    assert got.log_z == pytest.approx(D * float(log_z) + math.log(float(weights.mean())), abs=1e-9)
    assert "nats" in str(got)
    assert "trust" not in str(got)
    if w == 2:  # 1/ess -> E w^2 / (E w)^2 = E_pi[pi/q]: a Gaussian integral
        m, v = sampled(w)
        a, b = 2 / v1 - 1 / v, 2 * m1 / v1 - m / v
        second = torch.sqrt(v) / v1 / a.sqrt() * torch.exp(0.5 * (b**2 / a - 2 * m1**2 / v1 + m**2 / v))
        assert got.ess / n == pytest.approx(float(second) ** -D, rel=0.05)


class Rotated:
    """N(0, Q diag(lu) Q') and a class N(0, Q diag(lc) Q') in it, in 64 dimensions, lu/lc in 1..1 + narrower.

    cfg's flow scales axis i by k_i, so its law is N(0, k^2) there, and log q and log w are known of every sample.
    """

    def __init__(self, w, narrower, n):
        D, gen = 64, torch.Generator().manual_seed(0)
        self.Q = torch.linalg.qr(torch.randn(D, D, generator=gen, dtype=F64)).Q
        lu = torch.logspace(-1.5, 0.5, D, dtype=F64)
        lc = lu / (1 + narrower * torch.rand(D, generator=gen, dtype=F64))
        u, c = (gaussian(torch.zeros(D, dtype=F64), cov=self.Q @ torch.diag(v) @ self.Q.T) for v in (lu, lc))
        self.score = guidance.cfg(c.score(SDE), u.score(SDE), w)
        (u0, u1), (c0, c1) = ([marginal(SDE, t, 0.0, v)[1] for t in (T0, 1.0)] for v in (lu, lc))
        self.k2, self.v = (c0 / c1) ** w * (u0 / u1) ** (1 - w), 1 / (w / c0 + (1 - w) / u0)
        self.kl = float(0.5 * (self.k2 / self.v - 1 - torch.log(self.k2 / self.v)).sum())
        x = torch.randn(n, D, generator=gen, dtype=F64)
        x = x - x.mean(0)
        self.x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / n)).T  # moments of N(0, 1), to rounding

    def log_f(self, x):
        return torch.distributions.Normal(0.0, self.v.sqrt()).log_prob(x @ self.Q).sum(1)

    def log_w(self):
        x = self.x @ self.Q
        start = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
        return self.log_f((x * self.k2.sqrt()) @ self.Q.T) - start + 0.5 * self.k2.log().sum()

    def certificate(self, probes=None):
        how = {} if probes is None else {"probes": probes, "noise": Streams(7, len(self.x))}
        return certify(
            self.score, SDE, self.x, self.log_f, t=T0, normalised=True, method="multistep", steps=64, **how
        )  # fmt: skip


@pytest.mark.parametrize(("narrower", "kl"), [(0.35, 0.0204), (1.5, 0.99)])
def test_divergence_of_a_rotated_gaussian(narrower, kl):
    """KL to 0.01 nats outright in 64 dimensions, by the exact trace and by 8 probes: log w is quadratic in the start,
    whose second moments are those of the prior, so the mean over these samples is the expectation."""
    case = Rotated(2.0, narrower, 160)
    assert case.kl == pytest.approx(kl, rel=0.05)
    exact = case.certificate()
    assert abs(exact.kl - case.kl) < 0.003
    assert (exact.log_w - case.log_w()).abs().max() < 0.005
    noisy = case.certificate(8)
    assert abs(noisy.kl - case.kl) < 0.01
    assert (noisy.log_w - exact.log_w).square().mean().sqrt() < 0.05


def test_noise_of_probes():
    """Of deviation e in log w: no bias of KL, but ess falls by exp(-e^2) and the mean weight rises by exp(e^2/2)."""
    case = Rotated(2.0, 0.35, 800)
    known = case.log_w()
    e = {}
    for probes in (1, 2):
        got = case.certificate(probes)
        noise = got.log_w - known
        e[probes] = float(noise.std())
        assert abs(float(noise.mean())) < 4 * e[probes] / 800**0.5
        assert abs(got.kl - case.kl) < 4 * e[probes] / 800**0.5
        want = math.exp(-(e[probes] ** 2)) * float(known.exp().sum() ** 2 / (2 * known).exp().sum())
        assert got.ess == pytest.approx(want, rel=0.3)
    assert e[1] > 2 * e[2]


def test_off_is_exact():
    """w = 1 samples the class, up to the prior: nothing to certify but 1e-3 nats."""
    got = certificate(1.0, 2, 500, 2, tol=1e-5)
    assert abs(got.kl) < 3e-3
    assert got.ess > 499
    assert got.tail == -math.inf


def test_reweighted_averages():
    """Over 100 repeats means under the target are right, to three standard errors; the plain ones are not."""
    w, D, n = 2.0, 2, 300
    m, v, log_z = tilted(w)
    values, plain, shared = [], [], []
    for seed in range(100):
        x = Streams(10 + seed, n)(torch.empty(n, D, dtype=F64))
        got = certify(
            rule(w), SDE, x, lambda x: log_tilted(w)(x) - D * log_z, t=T0, normalised=True, method="multistep", steps=16
        )
        mean, error = got.average(torch.stack([got.x, got.x**2], 1))
        values.append((mean - torch.stack([m, v + m**2])[:, None]) / error)
        plain.append((got.x**2).mean(0))
        shared.append(
            got._replace(normalised=False, log_z=float(got.log_w.logsumexp(0)) - math.log(n)).average(got.x)[0]
        )
    z = torch.stack(values)
    assert (z.mean(0) * 10).abs().max() < 3
    assert z.std().item() == pytest.approx(1, abs=0.15)
    assert (z.abs() < 3).double().mean() > 0.98
    plain, shared = torch.stack(plain), torch.stack(shared)
    assert ((plain.mean(0) - v - m**2) / (plain.std(0) / 10)).abs().min() > 5
    assert ((shared.mean(0) - m) / (shared.std(0) / 10)).abs().max() < 3


def test_heavy_weights_are_told():
    """1/ess = E w^2 is infinite where q's variance is below half the target's: the tail says so, and ess does not."""
    narrow = gaussian_score(SDE, 0.0, 0.3)
    got = {}
    for var in (0.35, 0.9):

        def log_f(x, var=var):
            m, v = marginal(SDE, T0, 0.0, var)
            return torch.distributions.Normal(m, v.sqrt()).log_prob(x).sum(1)

        x = Streams(3, 4000)(torch.empty(4000, 1, dtype=F64))
        got[var] = certify(narrow, SDE, x, log_f, t=T0, method="multistep", steps=12)
    assert got[0.35].tail < 0.5
    assert got[0.9].tail > 0.5
    assert "trust" in str(got[0.9])
    assert "trust" not in str(got[0.35])


def test_error_of_an_average_covers():
    """The printed standard error is the spread over repeats."""
    draws = [certificate(2.0, 1, 400, 500 + k, method="multistep", steps=12) for k in range(60)]
    means, errors = zip(*[d.average(d.x) for d in draws], strict=True)
    assert float(torch.stack(errors).mean() / torch.stack(means).std()) == pytest.approx(1, abs=0.25)
    assert sum(d.kl_error for d in draws) / 60 == pytest.approx(float(tensor([d.kl for d in draws]).std()), rel=0.3)


@pytest.mark.parametrize("kernel", [kernels.ancestral, kernels.euler_maruyama, kernels.reverse_diffusion])
def test_weights_of_paths(kernel):
    """Paths of one Gaussian's chain, weighted, have the exact moments of another's chain, whatever the steps."""
    n, ts = 40_000, log_snr_grid(SDE, 6, 0.8, 0.05)
    x = Streams(4, 8)(torch.empty(8, n // 8, dtype=F64)).reshape(n, 1) * 1.05
    x1, log_w = girsanov(
        gaussian_score(SDE, 0.1, 0.6), gaussian_score(SDE, 0.0, 0.5), SDE, x, ts, kernel=kernel,
        noise=Draws(lambda i, x: Streams(20 + i, 1)(x[None])[0]),
    )  # fmt: skip
    w = log_w.exp()
    sampler = {kernels.ancestral: ancestral, kernels.euler_maruyama: euler_maruyama}.get(kernel)
    assert abs(float(w.mean()) - 1) < 4 * float(w.std()) / n**0.5
    if sampler is not None:
        A, C = chain(sampler, ts, 0.0, 0.5)
        want = A * 1.05**2 + C
        got = w * x1[:, 0] ** 2
        assert abs(float(got.mean()) - want) < 4 * float(got.std()) / n**0.5
        plain = x1[:, 0] ** 2
        assert abs(float(plain.mean()) - want) > 4 * float(plain.std()) / n**0.5


def test_weights_of_guided_paths():
    """Paths of cfg, w = 1.5, weighted, are those of the conditional chain: its mean, which cfg's own is not."""
    n, w, ts = 40_000, 1.5, log_snr_grid(SDE, 8, 0.6, 0.05)
    cond, uncond = gaussian_score(SDE, tensor([0.6, -0.4]), 0.5), gaussian_score(SDE, 0.0, 0.8)
    x = Streams(4, n)(torch.empty(n, 2, dtype=F64))
    x1, log_w = girsanov(
        guidance.cfg(cond, uncond, w), cond, SDE, x, ts, noise=Draws(lambda i, x: Streams(20 + i, 1)(x[None])[0])
    )
    weight = log_w.exp()
    assert abs(float(weight.mean()) - 1) < 4 * float(weight.std()) / n**0.5
    want = ancestral(cond, SDE, torch.zeros(1, 2, dtype=F64), ts, noise=torch.zeros_like)[0]
    got = weight[:, None] * x1
    assert ((got.mean(0) - want).abs() < 4 * got.std(0) / n**0.5).all()
    assert ((x1.mean(0) - want).abs() > 4 * x1.std(0) / n**0.5).all()


def chain(sampler, ts, mean, var):
    """(A^2, C^2) of x1 = A x + noise for the zero-mean chain: exact variance by `moments` at two starts."""
    out = moments(sampler, SDE, ts, mean, var)[1]
    v = marginal(SDE, ts[0], mean, var)[1]
    score = gaussian_score(SDE, mean, var)
    one = torch.ones(1, 1, dtype=F64)
    A = float(sampler(score, SDE, one, ts, noise=torch.zeros_like))
    return A**2, float(out) - A**2 * float(v)


def test_small_steps_are_girsanovs():
    """log dP/dQ against the integral -g (s - s') dW - g^2 |s - s'|^2 dt / 2 along the same noise."""
    ts = torch.linspace(0.6, 0.3, 1201, dtype=F64)
    x, draws = tensor([[0.4], [-1.0]]), []

    def noise(x):
        draws.append(Streams(9, 2)(torch.empty(2, 1201, dtype=F64))[:, len(draws)][:, None])
        return draws[-1]

    path = []
    score, other = gaussian_score(SDE, 0.3, 0.6), gaussian_score(SDE, 0.0, 0.5)
    _, log_w = girsanov(
        lambda x, t: path.append(x) or score(x, t), other, SDE, x, ts, kernel=kernels.euler_maruyama, noise=noise
    )
    want = 0.0
    for k in range(1200):
        t, dt = ts[k], ts[k] - ts[k + 1]
        gap, g = score(path[k], t) - other(path[k], t), SDE.diffusion(t)
        want = want - g * gap * dt.sqrt() * draws[k] - 0.5 * g**2 * gap**2 * dt
    torch.testing.assert_close(log_w, want[:, 0], rtol=1e-9, atol=1e-9)


def test_what_cannot_be_is_told():
    target = mixture(torch.ones(2), tensor([[-1.0], [1.0]]), var=tensor([0.1, 0.1]))
    x = torch.zeros(3, 1, dtype=F64)
    with pytest.raises(ValueError, match=r"one number a sample, \(3,\), got \(\)"):
        certify(target.score(SDE), SDE, x, lambda x: x.sum(), t=T0)
    with pytest.raises(ValueError, match="log_target of sample 0 is nan"):
        certify(target.score(SDE), SDE, x, lambda x: x[:, 0] * math.nan, t=T0)
    score = gaussian(tensor([0.0]), var=1.0).score(SDE)
    with pytest.raises(ValueError, match=r"step 2 of 2 draws no noise.*end the grid above"):
        girsanov(score, score, SDE, x, tensor(0.5, 0.2, 0.0))


def test_the_experiment(tmp_path):
    """Its claims hold on fewer samples, but for counting noise; its table and picture are written."""
    claims = study.main(["--quick", "--samples", "600", "--out", str(tmp_path)])
    assert [c.holds for c in claims[:3]] == [True, True, True]
    rows = (tmp_path / "certificate.csv").read_text().splitlines()
    assert rows[0].startswith("rule,w,KL,error,mean w")
    assert len(rows) == 7
    assert (tmp_path / "certificate.png").read_bytes().startswith(b"\x89PNG")
    mass, log_z = study.truth(study.three_classes(), 1.0)
    assert float(mass.sum()) == pytest.approx(1)
    assert log_z == pytest.approx(0, abs=1e-4)  # w = 1 is a density


class Normals(torch.nn.Module):
    """The score of N(0, WIDE) noised, and of N(MEAN, VAR) for class 0, as a network tells it."""

    def forward(self, x, t, y):
        wide, narrow = (gaussian_score(SDE, *law)(x, t) for law in ((0.0, WIDE), (MEAN, VAR)))
        return torch.where((y == 0)[:, None], narrow, wide)


def test_a_network_in_closed_form():
    """The table of a network that knows its densities: KL, Z and entropy, off and guided."""
    D, n = 2, 1200
    model = Model(Normals(), VP(t_min=T0), "score", sigma_data=1.0, classes=1)
    x_T = Streams(2, n)(torch.empty(n, D, dtype=F64))
    rows, drawn = network.table(model, 0, (1.0, 3.0), x_T, seed=3, steps=32, probes=2, again=4)
    assert [r["w"] for r in rows] == [1.0, 3.0]
    for r in rows:
        w = r["w"]
        v, log_z = sampled(w)[1], D * tilted(w)[2]
        assert abs(r["KL, own Z"] - divergence(w, D)) < 4 * r["error"] + 2e-3
        assert r["error"] < 0.05
        assert abs(r["log Z"] - float(log_z)) < 4 * (1 / (r["ESS/n"] * n) - 1 / n) ** 0.5 + 2e-3
        assert r["-log q"] == pytest.approx(
            float(D / 2 * torch.log(2 * math.pi * math.e * v)), abs=4 * (D / 2 / n) ** 0.5
        )
        assert drawn[w].mean() == pytest.approx(float(sampled(w)[0]), abs=4 * float(v / n / D) ** 0.5)
        assert r["left"] < 5e-3
    coarse, _ = network.table(model, 0, (3.0,), x_T[:40], seed=3, steps=6, probes=2, again=4)
    assert coarse[-1]["left"] > 10 * rows[-1]["left"]


def trained_like(file, classes=3):
    """A small network of random weights, so that its classes differ, in a file."""
    torch.manual_seed(0)
    net = UNet(channels=1, width=8, mults=(1,), classes=classes)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    save_model(file, Model(net, EDM(T=20.0, t_min=0.02), "F", sigma_data=0.7, classes=classes),
               data={"shape": [1, 4, 4], "low": -1.0, "high": 1.0})  # fmt: skip


def test_the_experiment_on_a_network(tmp_path, capsys):
    trained_like(tmp_path / "model.safetensors")
    how = ["--model", str(tmp_path / "model.safetensors"), "--label", "1", "--quick", "--out", str(tmp_path)]
    claims = study.main(how)
    assert [c.holds for c in claims[:2]] == [True, True]
    rows = (tmp_path / "certificate.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["w", "1.0", "2.0"]
    kl = [float(row.split(",")[1]) for row in rows[1:]]
    assert claims[2].value == pytest.approx(kl[1] - kl[0])
    assert (tmp_path / "certificate.png").read_bytes().startswith(b"\x89PNG")
    for wrong, message in (
        (["--label", "3"], "--label must lie in 0..2, got 3"),
        (["--samples", "1"], "at least 2, got 1"),
    ):
        with pytest.raises(SystemExit):
            study.main([*how, *wrong])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study.main(["--model", str(tmp_path / "none.safetensors"), "--out", str(tmp_path)])
    assert "no checkpoint at" in capsys.readouterr().err
