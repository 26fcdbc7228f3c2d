"""Networks as scores: exact for a network that says what a Gaussian implies; conditions; one call."""

import copy
from dataclasses import replace

import pytest
import torch
from truth import F64, KINDS, SD, SDES, gaussian_score, network, tensor, times

import guidance
from scoresde import EDM, VE, VP, DiscreteVP, Model, change_sde, counted, evaluate, linear_betas
from scoresde.nets import UNet

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)


class Net:
    """The x0-prediction mean + shift[y] + c of a point mass that its conditions choose; counts calls."""

    def __init__(self, shift=(0.0, 1.0, 2.0, 5.0)):
        self.shift, self.calls, self.rows, self.labels = tensor(shift), 0, 0, None

    def __call__(self, x, label, y=None, c=None, flag=None):
        self.calls, self.rows, self.labels = self.calls + 1, self.rows + len(x), label
        out = torch.zeros_like(x) if y is None else self.shift[y].reshape(-1, 1).expand_as(x).to(x)
        return out if c is None else out + c


def point(mean):
    return gaussian_score(VP(), mean, 0.0)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_prediction_is_the_exact_score(name, kind):
    sde = SDES[name]
    model = Model(network(kind, sde), sde, kind, label=lambda t: t, sigma_data=SD)
    for t in [*times(name, 3)[1:], times(name, 4)[1:5]]:  # one time, and one for each of the batch
        want = gaussian_score(sde)(X, t)
        s, r = sde.sigma(t).max().item(), (sde.sigma(t) / sde.alpha(t)).min().item()
        atol = 1e-11 * (1 + 1 / r) * max(1.0, 1 / s)
        torch.testing.assert_close(model(X, t), want, rtol=1e-8, atol=atol)


def test_default_labels():
    """c_noise = log(sigma/alpha)/4 for F, the integer label for a table, else the time itself."""
    t = tensor(0.5)
    table = DiscreteVP.from_betas(linear_betas(40))
    for sde, kind, want in (
        (EDM(), "F", 0.25 * torch.log(t)),
        (VP(), "F", 0.25 * torch.log(VP().sigma(t) / VP().alpha(t))),
        (table, "eps", tensor(19.0)),  # t = 0.5 is the 20th of 40 labels 0..39
        (VP(), "eps", t),
    ):
        for x, time in ((X, t), (X, t.expand(4)), (X.float(), t)):
            net = Net()
            Model(net, sde, kind)(x, time)
            torch.testing.assert_close(net.labels, want.to(x).expand(4))
    net = Net()
    Model(net, VP(), label=lambda t: 1000 * t)(X, t)
    torch.testing.assert_close(net.labels, torch.full((4,), 500.0, dtype=F64))


def test_given():
    """One label, labels for each sample, none; contexts of batch 1 or B; the original is untouched."""
    net, t = Net(), tensor(0.4)
    model = Model(net, VP(), "x0", classes=3)
    for y, mean in (
        (1, 1.0),
        (torch.tensor(2), 2.0),
        ([0, 1, 2, 0], tensor(0, 1, 2, 0)[:, None]),
        (None, 5.0),  # the network's "no label" is class 3
        (3, 5.0),
    ):
        torch.testing.assert_close(model.given(y)(X, t), point(mean)(X, t))
    torch.testing.assert_close(model(X, t), point(5.0)(X, t))
    torch.testing.assert_close(model.given(1).given(None)(X, t), point(5.0)(X, t))
    torch.testing.assert_close(model.given(1, c=tensor([[10.0, 20, 30]]))(X, t), point(tensor(11.0, 21, 31))(X, t))
    each = torch.arange(4, dtype=F64)[:, None].expand(4, 3)
    torch.testing.assert_close(model.given(2, c=each)(X, t), point(2 + each)(X, t))
    assert model.cond == {}
    assert dict(model.given(1, flag="a").given(2).cond) == {"flag": "a", "y": torch.tensor(2)}


def test_label_checks():
    model = Model(Net(), VP(), "x0", classes=3)
    for y, match in ((-1, "label -1 .*0..2"), ([0, 9], "label 9 .*0..2"), (1.0, "float32"), ([[1]], r"\(1, 1\)")):
        with pytest.raises(ValueError, match=match):
            model.given(y)
    with pytest.raises(ValueError, match=r"float64|torch.bool"):
        model.given(torch.tensor([True]))
    with pytest.raises(ValueError, match=r"classes=n"):
        Model(Net(), VP()).given(1)
    with pytest.raises(ValueError, match=r"3 labels.*batch of 4"):
        model.given([0, 1, 2])(X, tensor(0.5))
    with pytest.raises(ValueError, match=r"'c' has shape \(3, 3\).*batch 4"):
        model.given(c=torch.zeros(3, 3))(X, tensor(0.5))
    with pytest.raises(ValueError, match=r"unknown prediction 'noise'.*eps"):
        Model(Net(), VP(), "noise")
    with pytest.raises(ValueError, match=r"\(4, 6\).*\(4, 3\)"):
        Model(lambda x, t: torch.cat([x, x], 1), VP())(X, tensor(0.5))


@pytest.mark.parametrize("t", [tensor(0.4), tensor(0.1, 0.4, 0.6, 0.9)])
def test_evaluate_makes_one_network_call(t):
    net = Net()
    model = Model(net, VP(), "x0", classes=3)
    scores = [model.given(1), model, model.given([0, 1, 2, 0]), model.given(2)]
    want = [s(X, t) for s in scores]
    net.calls = net.rows = 0
    got = evaluate(scores, X, t)
    assert (net.calls, net.rows) == (1, 16)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_evaluate_keeps_apart_what_cannot_be_stacked():
    """Other networks, other labels of time, other shapes of context: right, in order, in as few calls as possible."""
    net, other, t = Net(), Net((3.0, 3, 3, 3)), tensor(0.4)
    model = Model(net, VP(), "x0", classes=3)
    c = torch.ones(1, 3, dtype=F64)
    scores = [
        model.given(1),
        Model(other, VP(), "x0", classes=3).given(0),
        point(7.0),
        model.given(2, c=c),
        model.given(0, c=2 * c),
        model.given(0, c=torch.ones(1, 1, dtype=F64)),
        replace(model, label=lambda t: 2 * t).given(2),
        model.given(0),
        model.given(1, flag=1),
    ]
    want = [1.0, 3.0, 7.0, 3.0, 2.0, 1.0, 2.0, 0.0, 1.0]
    for s, mean in zip(evaluate(scores, X, t), want, strict=True):
        torch.testing.assert_close(s, point(mean)(X, t), rtol=1e-10, atol=1e-10)
    assert (net.calls, other.calls) == (5, 1)  # {0, 7}, {3, 4}, 5, 6, 8


@pytest.mark.parametrize("old", SDES)
@pytest.mark.parametrize("new", SDES)
def test_change_sde_is_exact(old, new):
    """A Gaussian's score of one SDE becomes its score of another, wherever both know the noise level."""
    a, b = SDES[old], SDES[new]
    r = tensor(0.05, 0.3, 1.0, 4.0)  # sigma/alpha
    t = b.time(-r.log())
    changed = change_sde(gaussian_score(a), a, b)
    torch.testing.assert_close(changed(X, t), gaussian_score(b)(X, t), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(changed(X, t[1]), gaussian_score(b)(X, t[1]), rtol=1e-7, atol=1e-9)


def test_counted():
    score = counted(gaussian_score(VE()))
    want = gaussian_score(VE())(X, tensor(0.5))
    assert torch.equal(score(X, tensor(0.5)), want)
    score(X[:1], tensor(0.5))
    assert (score.calls, score.samples) == (2, 5)


def test_float32():
    """A float64 time on the CPU, as samplers pass it, leaves a float32 network float32."""
    seen = []

    def net(x, label):
        seen.append((x.dtype, label.dtype, label.shape))
        return x

    for t in (tensor(0.5), tensor(0.5, 0.6, 0.7, 0.8)):
        assert Model(net, VP())(X.float(), t).dtype == torch.float32
    assert seen == [(torch.float32, torch.float32, (4,))] * 2


def test_rows_of_a_condition():
    """`rows(index)` is the score of those rows, in that order, repeats too; a condition for all stays one."""
    net = UNet(channels=1, width=8, mults=(1,), classes=4)
    with torch.no_grad():
        for v in net.parameters():
            v.add_(0.1 * torch.randn(v.shape, generator=torch.Generator().manual_seed(v.numel())))
    model = Model(net.double(), VP(), "eps", classes=4)
    x, t = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    index = torch.tensor([2, 0, 0])
    for score in (model.given(torch.tensor([3, 1, 0])), model.given(2), model):
        torch.testing.assert_close(score.rows(index)(x[index], t), score(x, t)[index], rtol=1e-12, atol=1e-12)
    single = model.given(torch.tensor([3]))  # one label is one row's
    torch.testing.assert_close(single.rows(index * 0)(x, t), model.given(3)(x, t), rtol=1e-12, atol=1e-12)
    labelled = model.given(torch.tensor([3, 1, 0]))
    assert not torch.allclose(labelled(x, t)[1:2], labelled.rows(torch.tensor([0]))(x[1:2], t))


def test_unet_without_attention_is_local():
    """A changed corner changes nothing far away beyond the normalisation; with attention it does so directly."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, 64, 64)
    far = x.clone()
    far[..., :4, :4] += 1
    moved = {}
    for attention in (True, False):
        net = UNet(channels=1, width=8, mults=(1, 2), attention=attention)
        assert net.config["attention"] is attention
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
        for m in net.modules():
            if isinstance(m, torch.nn.GroupNorm):
                m.forward = lambda h: h  # what else looks at the whole image
        with torch.no_grad():
            a, b = (net(v, torch.zeros(1))[..., 40:, 40:] for v in (x, far))
        moved[attention] = float((a - b).abs().max())
    assert moved[False] == 0 < moved[True]


@torch.no_grad()
def test_a_unet_does_without_its_attention_when_it_is_told():
    """Alone, a pixel has weight 1 for itself: what softmax gives where there is one pixel.  Skipped: as if its output
    were 0.  Perturbed attention then guides by s + scale (s - s_p)."""
    torch.manual_seed(0)
    net = UNet(channels=1, width=8, mults=(1, 2)).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    label = torch.zeros(2, dtype=F64)
    one, many = (torch.randn(2, 1, n, n, dtype=F64) for n in (2, 8))
    ask = {how: [net(x, label, without=how) for x in (one, many)] for how in (None, "weights", "attention")}
    assert torch.allclose(ask[None][0], ask["weights"][0], rtol=0, atol=1e-12)
    assert float((ask[None][1] - ask["weights"][1]).abs().max()) > 1e-6

    wide = torch.randn(2, 1, 64, 64, dtype=F64)
    far = wide.clone()
    far[..., 0, 0] += 1
    local = copy.deepcopy(net)
    for m in local.modules():
        if isinstance(m, torch.nn.GroupNorm):
            m.forward = lambda h: h  # what else looks at the whole image
    reach = {}
    for how in (None, "weights", "attention"):
        a, b = (local(x, label, without=how)[..., -1, -1] for x in (wide, far))
        reach[how] = float((a - b).abs().max())
    assert reach["weights"] == reach["attention"] == 0 < reach[None]

    silent = copy.deepcopy(net)
    torch.nn.init.zeros_(silent.middle.out.weight)
    torch.nn.init.zeros_(silent.middle.out.bias)
    torch.testing.assert_close(ask["attention"][1], silent(many, label), rtol=0, atol=1e-12)

    model, t = Model(net, VP()), tensor(0.5)
    perturbed = model.given(without="weights")
    guided = guidance.cfg(model, perturbed, 1 + 2.0)(many, t)
    torch.testing.assert_close(guided, model(many, t) + 2.0 * (model(many, t) - perturbed(many, t)))
    for bad, how in ((net, "all"), (UNet(attention=False).double(), "weights")):
        with pytest.raises(ValueError, match="without must be 'weights' or 'attention', of a UNet that has attention"):
            bad(many, label, without=how)
