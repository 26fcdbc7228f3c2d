"""Parallel in time against the sampler step by step: the same result, in few rounds, sample by sample."""

from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from truth import F64, SDES, gaussian_score, log_snr_grid, tensor

from samplers import ancestral, ddim, euler_maruyama, grids, kernels
from samplers.parallel import _jacobian, parallel
from scoresde import EDM, VP, Streams, counted, gaussian, mixture
from scoresde.adaptive import rowwise

SDE1 = partial(kernels.ddim, eta=1.0)


def two(B=16):
    g = torch.Generator().manual_seed(0)
    means = torch.randn(5, 2, generator=g, dtype=F64)
    target = mixture(torch.ones(5, dtype=F64), 0.5 * means / means.std(), var=tensor(0.01, 0.02, 0.03, 0.005, 0.01))
    return VP(), target.score(VP()), torch.randn(B, 2, generator=g, dtype=F64)


def sixtyfour(B=16):
    g = torch.Generator().manual_seed(1)
    means = 0.45 * torch.randn(8, 64, generator=g, dtype=F64)
    target = mixture(torch.ones(8, dtype=F64), means, var=torch.full((8,), 0.05, dtype=F64))
    return VP(), target.score(VP()), torch.randn(B, 64, generator=g, dtype=F64)


def digits(B=8):
    """10 Gaussians with the class means and covariances of the digits in [-1, 1], and a grey level's noise."""
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=F64) / 8 - 1, torch.tensor(data.target)
    covs = [torch.cov(x[y == k].T, correction=0) + 0.125**2 / 12 * torch.eye(64, dtype=F64) for k in range(10)]
    means = torch.stack([x[y == k].mean(0) for k in range(10)])
    target = mixture(torch.ones(10, dtype=F64), means, covs=torch.stack(covs))
    return EDM(), target.score(EDM()), 80 * torch.randn(B, 64, generator=torch.Generator().manual_seed(0), dtype=F64)


PROBLEMS = {"2-D": two, "64-D": sixtyfour, "digits": digits}


def end(sde):
    return max(sde.t_min, 1e-3)


def rms(x, want):
    return float((x - want).square().flatten(1).mean(1).sqrt().max())


SLOPES = [{"memory": 0}, {"memory": 3}, {"stretches": 7}]


@pytest.mark.parametrize("slopes", SLOPES, ids=str)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_run_to_convergence_it_is_the_sequential_result(name, eta, slopes):
    sde, score, x = PROBLEMS[name](4)
    ts = grids.log_snr(sde, 60, t_end=end(sde))
    want = ddim(score, sde, x, ts, eta=eta, noise=Streams(5, 4))
    kernel = partial(kernels.ddim, eta=eta)
    got = parallel(rowwise(score), sde, x, ts, kernel=kernel, noise=Streams(5, 4), tol=1e-12, **slopes)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize(
    ("sampler", "kernel"),
    [(ddim, kernels.ddim), (ancestral, kernels.ancestral), (euler_maruyama, kernels.euler_maruyama)],
)
def test_every_sde_and_kernel(sde, sampler, kernel):
    process = SDES[sde]
    score, ts = gaussian_score(process, tensor(0.7, -1.0), tensor(0.05, 2.0)), log_snr_grid(process, 40)
    x = process.prior_std * tensor([[1.0, 0.3], [-2.0, 1.0], [0.1, 0.0]])
    want = sampler(score, process, x, ts, noise=Streams(1, 3))
    got = parallel(rowwise(score), process, x, ts, kernel=kernel, noise=Streams(1, 3), tol=1e-13)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("d", [0.5, 1.3])
def test_gaussian_data_take_two_rounds(d):
    """N(0, d^2) data are the linear part, which is exact: the first round finds the path, the second confirms it."""
    sde, rounds = VP(), []
    ts, x = log_snr_grid(sde, 100), tensor([[1.0, -0.4]])
    score = gaussian_score(sde, 0.0, d**2)
    got = parallel(
        rowwise(score), sde, x, ts, tol=1e-9, sigma_data=d, memory=0, on_round=lambda k, x, e: rounds.append(k)
    )
    torch.testing.assert_close(got, ddim(score, sde, x, ts), rtol=1e-12, atol=1e-12)
    assert rounds == [1]


@pytest.mark.parametrize("slopes", [{"memory": 0}, {"memory": 2}, {"stretches": 2}], ids=str)
def test_after_k_rounds_the_first_k_states_are_exact(slopes):
    """N steps take N rounds at most, at any tolerance."""
    sde, score, x = two(3)
    ts = grids.log_snr(sde, 5, t_end=1e-3)
    got = parallel(rowwise(score), sde, x, ts, tol=1e-300, **slopes)
    torch.testing.assert_close(got, ddim(score, sde, x, ts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", [grids.log_snr, grids.karras])
@pytest.mark.parametrize("name", PROBLEMS)
def test_five_hundred_steps_in_fourteen_rounds(name, grid):
    """To 1e-3 of the data's standard deviation (0.5), the sampler itself deciding when; rounds are calls."""
    sde, score, x = PROBLEMS[name]()
    ts, seen = grid(sde, 500, t_end=end(sde)), []
    calls = counted(score)
    got = parallel(rowwise(calls), sde, x, ts, tol=1e-3, on_round=lambda k, x, e: seen.append(k))
    assert rms(got, ddim(score, sde, x, ts)) < 1e-3 * 0.5
    assert seen == list(range(1, len(seen) + 1))
    assert calls.calls == len(seen) <= 14
    assert calls.samples < len(seen) * len(x) * 500  # samples that are done have left


@pytest.mark.parametrize("name", ["2-D", "64-D"])
def test_frozen_noise_in_fourteen_rounds(name):
    sde, score, x = PROBLEMS[name](8)
    ts, calls = grids.log_snr(sde, 500, t_end=end(sde)), counted(score)
    got = parallel(rowwise(calls), sde, x, ts, kernel=SDE1, noise=Streams(3, 8))
    assert rms(got, ddim(score, sde, x, ts, eta=1.0, noise=Streams(3, 8))) < 1e-3 * 0.5
    assert calls.calls <= 14


def test_secants_save_rounds():
    """And a slope bound of 2 keeps them from throwing the path off."""
    rounds = []
    for memory in (0, 3):
        sde, score, x = digits(4)
        calls = counted(score)
        parallel(rowwise(calls), sde, x, grids.log_snr(sde, 200), memory=memory, tol=1e-6)
        rounds.append(calls.calls)
    assert rounds[1] <= rounds[0] - 2


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_with_the_jacobian_gaussian_data_of_any_shape_take_two_rounds(eta):
    """A stretch a step: the linear part is exact whatever the covariance, and a wrong d is of no matter."""
    sde, rounds, C = VP(), [], tensor([1.0, 0.4, -0.3], [0.4, 0.5, 0.2], [-0.3, 0.2, 0.6])
    score = gaussian(tensor(0.7, -1.0, 0.3), cov=C).score(sde)
    ts, x = log_snr_grid(sde, 60), tensor([[1.0, -0.4, 0.2], [-2.0, 0.1, 1.0]])
    want = ddim(score, sde, x, ts, eta=eta, noise=Streams(1, 2))
    kernel = partial(kernels.ddim, eta=eta)
    first = []

    def on_round(k, y, change):
        rounds.append(k)
        first.append(y)

    parallel(
        score, sde, x, ts, kernel=kernel, noise=Streams(1, 2), tol=1e-9, sigma_data=5.0, stretches=60, on_round=on_round
    )
    assert rounds == [1, 2]
    torch.testing.assert_close(first[0], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_jacobian_finds_the_mode_in_fewer_rounds(name):
    """Frozen noise, 500 steps: at most 11 rounds where secants take up to 17, sample by sample to 1e-3."""
    sde, score, x = PROBLEMS[name]()
    ts, calls, rest = grids.log_snr(sde, 500, t_end=end(sde)), counted(score), counted(score)
    run = partial(parallel, sde=sde, x=x, ts=ts, kernel=SDE1)
    got = run(rowwise(calls), stretches=32, noise=Streams(3, len(x)))
    assert rms(got, ddim(score, sde, x, ts, eta=1.0, noise=Streams(3, len(x)))) < 1e-3 * 0.5
    run(rowwise(rest), noise=Streams(3, len(x)))
    assert calls.calls <= min(11, rest.calls - 2)


@pytest.mark.parametrize(("N", "stretches", "groups"), [(40, 8, 8), (41, 8, 7), (5, 32, 5)])
def test_the_jacobian_costs_rows_not_rounds(N, stretches, groups):
    """One call a round of N + stretches D rows for each sample; for a score without rows, a call for each of them."""
    sde, score, x = two(3)
    ts, declared, plain, rounds = grids.log_snr(sde, N, t_end=1e-3), counted(score), counted(score), []
    run = partial(parallel, sde=sde, x=x, ts=ts, tol=1e-9, stretches=stretches)
    run(rowwise(declared), max_rounds=N, on_round=lambda k, x, e: rounds.append(k))
    run(lambda x, t: plain(x, t), max_rounds=N)
    assert declared.calls == len(rounds)
    assert 3 * (N + 2 * groups) <= declared.samples <= len(rounds) * 3 * (N + 2 * groups)
    assert plain.calls == len(rounds) * (N + 2 * groups)
    assert plain.samples == 3 * plain.calls


def test_slopes_beyond_those_of_data_are_cut():
    """alpha dx0/dx is symmetric with eigenvalues of 0 to 2; J is it less 1, whatever the columns are."""
    Q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=F64))[0]
    skew = tensor([0.0, 1.0, -2.0], [-1.0, 0.0, 0.5], [2.0, -0.5, 0.0])
    columns = (Q @ torch.diag(tensor(-4.0, 0.25, 9.0)) @ Q.T + skew).T[:, None]  # (D, 1, D): column j first
    torch.testing.assert_close(_jacobian(columns)[0, 0], Q @ torch.diag(tensor(-1.0, 0.25, 1.0)) @ Q.T)


def test_a_slope_seen_once_is_known():
    """Gaussian data of another width: the second round has every step's slope, the third confirms."""
    sde, rounds = VP(), []
    score, ts, x = gaussian_score(sde, 0.3, 0.01), log_snr_grid(sde, 80), tensor([[1.2]])
    got = parallel(rowwise(score), sde, x, ts, memory=1, tol=1e-9, on_round=lambda k, x, e: rounds.append(k))
    torch.testing.assert_close(got, ddim(score, sde, x, ts), rtol=1e-10, atol=1e-10)
    assert rounds == [1, 2, 3]


def test_secants_throw_no_state_off():
    """Data within 3, frozen noise: no round's state is beyond 10 (without the bound on slopes, beyond 10^3)."""
    sde, score, x = two(16)
    ts, seen = grids.log_snr(sde, 200, t_end=1e-3), []
    for seed in range(4):
        parallel(
            rowwise(score), sde, x, ts, kernel=SDE1, noise=Streams(seed, 16), on_round=lambda k, x, e: seen.append(x)
        )
    assert max(float(x.abs().max()) for x in seen) < 10


def test_a_path_that_moves_is_not_done_though_its_end_stands_still():
    """x1 = 1, x2 = x1, x3 = 1000 where x2 > 1/2: seen from the start, x3 stays 0 for two rounds."""
    sde, ts = EDM(), tensor(4.0, 3.0, 2.0, 1.0)

    def score(x, t):
        return torch.where(t[:, None] == 4, 1.0, torch.where(t[:, None] == 3, x, torch.where(x > 0.5, 1000.0, 0.0)))

    def copy(sde, ts):
        return torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64), torch.zeros(3, dtype=F64)

    got = parallel(rowwise(score), sde, tensor([[0.0]]), ts, kernel=copy, memory=0, sigma_data=1e3, tol=1e-4)
    assert float(got) == pytest.approx(1000, rel=1e-3)


@pytest.mark.parametrize("D", [5, 48])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("stretches", [0, 4])
def test_a_sample_alone_is_the_same_as_in_a_batch(D, dtype, declared, stretches):
    """To the bit, with samples that finish in different rounds, in chunks or not, leaving or not."""
    sde = VP()
    wrap = rowwise if declared else (lambda score: score)
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(0), dtype=F64).to(dtype)
    x[0] *= 5
    ts, last = log_snr_grid(sde, 30), {}

    def bent(x, t):  # two modes in every coordinate: elementwise, so its own bits do not depend on the batch
        a, s = (q.to(x).reshape(-1, 1) for q in (sde.alpha(t), sde.sigma(t)))
        V = a * a * 0.05 + s * s
        return (a * 0.7 * torch.tanh(0.7 * a * x / V) - x) / V

    def run(rows, **more):
        return parallel(wrap(bent), sde, x[rows], ts, kernel=SDE1, noise=Streams(7, rows), stretches=stretches, **more)

    whole = run(range(5), on_round=lambda k, x, e: last.update({i: k for i in range(5) if e[i] > 1e-3}))
    assert len(set(last.values())) > 1
    assert torch.equal(run(range(5), chunk=7), whole)
    for rows in (range(1), range(4, 5), range(1, 4)):
        assert torch.equal(run(rows), whole[rows.start : rows.stop])


class Labelled:
    """A score with a mean for each of its rows."""

    def __init__(self, sde, mean):
        self.sde, self.mean = sde, mean

    def __call__(self, x, t):
        assert len(x) == len(self.mean)
        return gaussian_score(self.sde, self.mean, 0.04)(x, t)


class Indexed(Labelled):
    def rows(self, index):
        return Indexed(self.sde, self.mean[index])


@pytest.mark.parametrize("kind", [Labelled, Indexed])
def test_scores_that_hold_something_for_each_row(kind):
    """One that gives its rows is called once a round; any other with its own B rows, once for each step."""
    sde, mean = VP(), tensor([[-1.0, 0.0], [2.0, 1.0], [0.3, -0.3]])
    score, ts, x, rounds = kind(sde, mean), log_snr_grid(sde, 20), tensor([[0.1, 1.0], [-1.0, 0.0], [2.0, 2.0]]), []
    got = parallel(score, sde, x, ts, tol=1e-12, on_round=lambda k, x, e: rounds.append(k))
    torch.testing.assert_close(got, ddim(score, sde, x, ts), rtol=1e-10, atol=1e-10)
    if kind is Labelled:
        calls = counted(score)
        parallel(calls, sde, x, ts, tol=1e-12)
        assert calls.calls == 20 * rounds[-1]
        assert calls.samples == 3 * calls.calls


def test_windows_follow_each_other():
    sde, score, x = two(4)
    ts, whole, parts = grids.log_snr(sde, 50, t_end=1e-3), counted(score), counted(score)
    want = ddim(score, sde, x, ts, eta=1.0, noise=Streams(2, 4))
    run = partial(parallel, sde=sde, x=x, ts=ts, kernel=SDE1, tol=1e-12)
    for calls, window, stretches in ((whole, None, 0), (parts, 20, 0), (parts, 20, 4)):
        got = run(rowwise(calls), noise=Streams(2, 4), window=window, stretches=stretches)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert parts.calls > whole.calls


def test_any_rank_float32_and_a_grid_that_ends_at_zero():
    sde = EDM()
    x = 80 * torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    ts = grids.karras(sde, 40, to_zero=True)
    score = gaussian_score(sde)
    got = parallel(rowwise(score), sde, x, ts, tol=1e-5)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, ddim(score, sde, x, ts), rtol=1e-4, atol=1e-4)
    flat = parallel(rowwise(score), sde, x.flatten(1), ts, tol=1e-5)
    assert torch.equal(got.flatten(1), flat)


@pytest.mark.parametrize("slopes", SLOPES, ids=str)
def test_gradient(slopes):
    """grad=True differentiates the fixed point like the sequential run; the default keeps no graph."""
    sde, score, x = two(3)
    ts = grids.log_snr(sde, 30, t_end=1e-2)
    x.requires_grad_()
    want = torch.autograd.grad((ddim(score, sde, x, ts, grad=True) ** 2).sum(), x)[0]
    out = parallel(rowwise(score), sde, x, ts, tol=1e-13, grad=True, **slopes)
    torch.testing.assert_close(torch.autograd.grad((out**2).sum(), x)[0], want, rtol=1e-6, atol=1e-8)
    assert not parallel(rowwise(score), sde, x, ts).requires_grad


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"memory": -1}, "memory must be at least 0, got -1"),
        ({"stretches": -1}, "stretches must be at least 0, got -1"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"tol": 0.0}, "tol must be positive, got 0.5 and 0.0"),
        ({"ts": tensor(0.5, 1.0)}, "ts must decrease"),
    ],
)
def test_refused(more, match):
    sde, score, x = two(2)
    with pytest.raises(ValueError, match=match):
        parallel(score, sde, x, **{"ts": grids.log_snr(sde, 5), **more})


def test_no_agreement_and_no_number_are_told():
    sde, score, x = two(2)
    ts = grids.log_snr(sde, 50)
    with pytest.raises(
        RuntimeError, match=r"2 of 2 samples are not within tol = 1e-09 after 2 rounds.*raise max_rounds"
    ):
        parallel(rowwise(score), sde, x, ts, tol=1e-9, max_rounds=2)
    for stretches in (0, 10):
        with pytest.raises(FloatingPointError, match="sample 0 is not finite after round 1"):
            parallel(rowwise(lambda x, t: score(x, t) / (t[:, None] > 0.5)), sde, x, ts, stretches=stretches)
    wide = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    with pytest.raises(FloatingPointError, match="sample 0 is not finite after round 1"):  # not eigh's own complaint
        parallel(rowwise(lambda x, t: x * float("nan")), sde, wide, ts, stretches=10)
