"""Guided scores of some rows: the same numbers, from the rows asked for alone, and an adaptive run that needs fewer."""

from functools import partial

import pytest
import torch
from truth import F64, gaussian_score, tensor

import guidance
from guidance import (
    anneal,
    apg,
    cfg,
    classifier,
    conjunction,
    energy,
    frequency,
    mpgd,
    operators,
    perp_neg,
    product,
    rescale,
    stages,
    tangential,
    total,
    universal,
    zero_star,
)  # fmt: skip
from samplers import ode
from scoresde import VP, Model, counted, flow, gaussian, rowwise
from scoresde.adaptive import rows_of

SDE, B, HERE = VP(), 6, torch.tensor(0.25, dtype=F64)
INDEX = torch.tensor([4, 0, 0, 5])
W = torch.linspace(-0.5, 3.0, B, dtype=F64)
V = W.flip(0) / 3


class Means:
    """The score of N(mean_b, var), a mean of its own for every row."""

    def __init__(self, mean, var):
        self.mean, self.var = mean, var

    def __call__(self, x, t):
        assert len(x) == len(self.mean)
        return gaussian_score(SDE, self.mean, self.var)(x, t)

    def rows(self, index):
        return Means(self.mean[index], self.var)


def means(seed, var):
    return Means(torch.randn(B, 3, generator=torch.Generator().manual_seed(seed), dtype=F64), var)


class Target:
    """E = |x0 - target_b|^2, a target of its own for every row."""

    def __init__(self, target):
        self.target = target

    def __call__(self, x0):
        return (x0 - self.target).square().sum(1)

    def rows(self, index):
        return Target(self.target[index])


class Classes:
    """log p(class_b | x) of a linear classifier."""

    def __init__(self, label):
        self.label = label

    def __call__(self, x, t):
        return torch.log_softmax(x, 1)[torch.arange(len(x)), self.label]

    def rows(self, index):
        return Classes(self.label[index])


C, U, N = means(0, 0.3), means(1, 0.5), means(2, 0.8)
E = Target(torch.randn(B, 3, generator=torch.Generator().manual_seed(3), dtype=F64))
X = torch.randn(B, 3, generator=torch.Generator().manual_seed(4), dtype=F64)
LABELS = Classes(torch.tensor([0, 1, 2, 2, 1, 0]))
RULES = {
    "cfg": partial(cfg, C, U, W),
    "cfg in an interval": partial(cfg, C, U, W, sde=SDE, interval=(0.1, 1.0)),
    "cfg by sigma": partial(cfg, C, U, lambda r: 1 + r, sde=SDE),
    "cfg by name": partial(cfg, w=W, cond=C, uncond=U),
    "product": partial(product, [C, U, N], [W, 0.5, V]),
    "product, weights in a tensor": partial(product, [C, U], tensor(0.4, 0.6)),
    "conjunction": partial(conjunction, U, (C, N), [V, W]),
    "rescale": partial(rescale, C, U, W, sde=SDE),
    "rescale of apg": partial(rescale, C, U, W, sde=SDE, rule=partial(apg, eta=0.5)),
    "frequency": partial(frequency, C, U, W, V),
    "apg": partial(apg, C, U, W, sde=SDE, eta=0.2, threshold=0.5),
    "zero_star": partial(zero_star, C, U, W, sde=SDE, zeroed=(2.0, 1e9)),
    "tangential": partial(tangential, C, U, W),
    "perp_neg": partial(perp_neg, C, U, W, [N, C], [V, 0.3]),
    "perp_neg, off": partial(perp_neg, C, U, W, [N], [0.0]),
    "energy": partial(energy, C, SDE, E, W, limit=2.0),
    "energy, cheap": partial(energy, C, SDE, E, W, through=False),
    "total": partial(energy, C, SDE, total([E, rowwise(lambda x0: x0.square().sum(1))], [0.3, 0.7]), W),
    "stages": partial(stages, C, SDE, [((0.0, 1.0), E), ((1.0, 9.0), total([E]))], W),
    "mpgd": partial(mpgd, C, SDE, E, 0.1 * W, steps=2),
    "universal": partial(universal, C, SDE, E, W, steps=2),
    "universal, forward": partial(universal, C, SDE, E, W),
    "classifier": partial(classifier, C, LABELS, W),
    "nested": lambda: energy(rescale(C, product([U, N], [V, W]), W, sde=SDE), SDE, E, V),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rows_of_a_rule(name):
    """The same numbers as the whole batch's, at one time or at one for each row; rows may repeat, and have rows."""
    score = RULES[name]()
    some = rows_of(score, INDEX)
    times = torch.linspace(0.05, 0.9, B, dtype=F64)
    for t, at in ((HERE, HERE), (times, times[INDEX])):
        whole = score(X, t)
        assert (whole - C(X, t)).abs().amax(1)[INDEX].max() > 1e-6  # the rule does something
        torch.testing.assert_close(some(X[INDEX], at), whole[INDEX], rtol=1e-12, atol=1e-12)
    last = rows_of(some, torch.tensor([3, 1]))
    torch.testing.assert_close(last(X[[5, 0]], times[[5, 0]]), score(X, times)[[5, 0]], rtol=1e-12, atol=1e-12)


def test_every_rule_is_here():
    """Those without rows: they hold one measurement or one for each row, or a memory of the steps of a run."""
    tried = {name.split(",")[0].split()[0] for name in RULES}
    without = {"dps", "pigdm", "mmps", "tmpd", "ddnm", "diffpir", "anneal"}
    of_a_run = {"apg_momentum", "superpose", "twisted", "ddnm_plus", "ddrm", "daps", "feynman_kac"}
    no_rules = {
        "Certificate", "Energy", "FeynmanKac", "certify", "clip_energy", "cutouts", "gradient_picture", "load_clip",
        "operators", "out_of_range", "plus_plus", "ramp", "total_variation",
    }  # fmt: skip
    assert tried - {"nested"} == set(guidance.__all__) - without - of_a_run - no_rules
    A = operators.mask(torch.ones(3))
    assert rows_of(anneal(C, SDE, A, tensor(0.1, 0.2, 0.3), 0.1), INDEX) is None


def test_a_part_without_rows():
    bare = gaussian_score(SDE)
    for score in (
        cfg(C, bare, 2.0), cfg(bare, C, 2.0), product([C, bare], [1, 2]), conjunction(C, [bare], [2]),
        energy(bare, SDE, E), energy(C, SDE, lambda x0: x0.sum(1)), mpgd(C, SDE, total([E, lambda x0: x0.sum(1)]), 1.0),
        classifier(C, lambda x, t: x.sum(1)), cfg(cfg(C, bare, 3.0), C, 2.0), perp_neg(C, U, 2.0, [N, bare], [1, 1]),
    ):  # fmt: skip
        assert rows_of(score, INDEX) is None
    assert rows_of(cfg(C, rowwise(bare), 2.0), INDEX) is not None


def test_a_rule_that_is_off_is_its_part():
    bare = gaussian_score(SDE)
    assert cfg(C, bare, 1) is C
    assert cfg(cond=bare, uncond=C, w=0) is C
    assert apg(bare, C, 1, sde=SDE) is bare
    assert energy(C, SDE, E, 0) is C
    assert universal(C, SDE, E, scale=0) is C
    assert stages(C, SDE, []) is C


@pytest.mark.parametrize("w", [W, 1.7])
def test_a_guided_adaptive_run_lets_samples_go(w):
    """The same bits as without rows, through `flow` and `ode`; fewer rows evaluated, and no call more."""
    scale = torch.logspace(-2, 1, B, dtype=F64)[:, None]  # so that some are done sooner than others
    fast, slow = counted(Means(X * scale, 0.3)), counted(Means(-X * scale, 0.01))
    score = cfg(fast, slow, w)
    go = partial(flow, sde=SDE, x=X, t=SDE.T, t1=1e-3, rtol=1e-5, atol=1e-5)
    left = go(score)
    calls, samples = slow.calls, slow.samples
    assert fast.samples == samples
    stay = go(lambda x, t: score(x, t))
    assert (slow.calls, slow.samples) == (2 * calls, samples + B * calls)
    assert torch.equal(left, stay)
    assert samples < B * calls - 20
    assert torch.equal(left, ode(score, SDE, X, tensor(SDE.T, 1e-3), rtol=1e-5, atol=1e-5))


def test_models_that_share_a_network_still_share_the_call():
    seen = []

    def net(x, label, y):
        seen.append(len(x))
        return x * (0.1 + 0.1 * y[:, None])

    model = Model(net, SDE, "eps", classes=5)
    score = cfg(model.given(torch.tensor([0, 1, 2, 3, 4, 0])), model, W)
    whole = score(X, HERE)
    some = rows_of(score, INDEX)(X[INDEX], HERE)
    assert seen == [2 * B, 2 * len(INDEX)]
    torch.testing.assert_close(some, whole[INDEX], rtol=1e-12, atol=1e-12)


def test_exact_targets_are_parts():
    score = cfg(gaussian(tensor(0.5, 0, 0), var=0.2).score(SDE), gaussian(tensor(0.0, 0, 0)).score(SDE), W)
    torch.testing.assert_close(rows_of(score, INDEX)(X[INDEX], HERE), score(X, HERE)[INDEX], rtol=1e-12, atol=1e-12)
