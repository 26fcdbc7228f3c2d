"""guided-diffusion's variational bound with given noise.

Its steps, prior and KL to the cases' tolerance (in fact 2e-12).  Its decoder's normal CDF is a tanh formula: with the
exact one the last term moves by 0.0012 bits/dim, with theirs in its place everything is the same.
"""

import math

import pytest
import torch
from reference import F64, load, recorded

from scoresde import DiscreteVP
from scoresde.bounds import bin_log_prob, chain_bound, normal_kl

BINS = (256, -1 - 1 / 255, 1 + 1 / 255)
FLOOR = math.log(1e-12)


def tanh_cdf(monkeypatch):
    """log of (1 + tanh(sqrt(2/pi)(u + 0.044715 u^3)))/2."""
    log_cdf = lambda u: torch.nn.functional.logsigmoid(2 * math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))  # noqa: E731
    monkeypatch.setattr(torch.special, "log_ndtr", log_cdf)


def nats(case, key):
    """Their bits/dim times D log 2."""
    return case[key] * case["in_x_start"][0].numel() * math.log(2)


def close(got, want, rtol=1e-9):
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-11)


@pytest.mark.parametrize("rule", ["small", "large"])
def test_bound(rule, monkeypatch):
    case, key = load("gd/bound"), f"FIXED_{rule.upper()}"
    x = case["in_x_start"]
    sde = DiscreteVP(case["in_full_alphas_cumprod"])
    score, ts = case.target(shape=x.shape[1:]).score(sde), sde.label_time(case["in_kept"].to(F64)).flip(0)

    def bound():
        return chain_bound(score, sde, x, ts, bins=BINS, variance=rule, noise=recorded(case["in_noise"]))

    got, vb, total = bound(), nats(case, f"out_vb_{key}"), nats(case, f"out_total_bpd_{key}")
    close(got.prior, nats(case, f"out_prior_bpd_{key}"))
    close(got.steps, vb[:, :-1])
    off = (got.reconstruction - vb[:, -1]).abs().max() / (48 * math.log(2))
    assert 1e-4 < off < 1.3e-3
    close(got.total - got.reconstruction, total - vb[:, -1])
    tanh_cdf(monkeypatch)
    close(
        bound().reconstruction, vb[:, -1], rtol=1e-6
    )  # the tolerance of gd/discretized_loglik: they subtract CDFs near 1
    close(bound().total, total, rtol=1e-6)


def test_the_same_chain_as_a_table_of_its_own():
    """The respaced chain is also every label of the table of its own alphas."""
    case = load("gd/bound")
    x = case["in_x_start"]
    sde = DiscreteVP(case["in_full_alphas_cumprod"][case["in_kept"]])
    ts = sde.label_time(torch.arange(sde.N - 1, -1, -1, dtype=F64))
    got = chain_bound(case.target(shape=x.shape[1:]).score(sde), sde, x, ts, noise=recorded(case["in_noise"]))
    close(got.steps, nats(case, "out_vb_FIXED_SMALL")[:, :-1])


def test_discretized_log_likelihood(monkeypatch):
    """Theirs is never below log 1e-12; the masses differ by 2e-4 at most, the exact ones add up to 1."""
    case = load("gd/discretized_loglik")
    k = ((case["in_x"] + 1) * 127.5).round().long()
    args = (k, case["in_means"], case["in_log_scales"].exp(), BINS)
    assert (bin_log_prob(*args).exp() - case["out_logp"].exp()).abs().max() < 2.1e-4
    tanh_cdf(monkeypatch)
    case.check(bin_log_prob(*args).clamp(min=FLOOR), "out_logp")


def test_normal_kl():
    case = load("gd/discretized_loglik")
    got = normal_kl(case["in_m1"], case["in_lv1"].exp(), case["in_m2"], case["in_lv2"].exp())
    case.check(got, "out_normal_kl", rtol=1e-13, atol=1e-13)
