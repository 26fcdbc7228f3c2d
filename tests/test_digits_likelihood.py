"""The experiment on a network of two seconds: what must hold for any network, holds."""

from dataclasses import replace

import torch

from experiments import digits_likelihood
from experiments.digits import load
from experiments.digits_likelihood import over, right
from experiments.rating import VALUE, How, Task, bounded, rate, streams
from scoresde import EDM, Model, bits_per_dim, dequantize, gaussian
from scoresde.types import number


def test_on_a_hurried_network(tmp_path, capsys):
    """More draws never cost more; a second run reuses the file and prints the same."""
    argv = ["--quick", "--budget", "2", "--out", str(tmp_path)]
    claims = {c.claim: c for c in digits_likelihood.main(argv)}
    printed = [line for line in capsys.readouterr().out.splitlines() if "±" in line]
    assert claims["cells' masses: 2 draws less 1"].holds
    assert len(printed) == 14
    digits_likelihood.main(argv)
    out = capsys.readouterr().out
    assert "reusing" in out
    assert [line for line in out.splitlines() if "±" in line] == printed


class Exact(torch.nn.Module):
    """In the place of a network: the score of the class N(m_y, 0.5), or of all, m = 0."""

    def __init__(self, sde, means):
        super().__init__()
        self.sde, self.means = sde, torch.nn.Parameter(means)

    def forward(self, x, label, y):
        t = self.sde.time(-4 * label.double())
        a, s = (f(t).reshape(-1, *[1] * (x.ndim - 1)) for f in (self.sde.alpha, self.sde.sigma))
        return ((a * self.means[y] - x) / (0.5 * a**2 + s**2)).to(x)


def tasks(means, n, **asked):
    """A task of n held-out digits under the exact model of these class means (11, 1, 8, 8), and their levels."""
    _, held = load(None, 0)
    sde = EDM(T=20.0, t_min=0.005)
    label = lambda t: -0.25 * sde.lam(t)  # noqa: E731
    model = Model(Exact(sde, means), sde, "score", classes=10, sigma_data=0.7, label=label)
    order, how = torch.arange(40, 40 + n), How(steps=24, probes=1, **asked)
    reference = gaussian(torch.zeros(1, 8, 8), var=0.5)
    return Task(model, held.x, held.y, (17, -1.0, 1.0), how, order, reference, None), held.x[order]


def test_rated_items_are_what_the_library_says():
    """Values by hand from the draws the task names, in the task's order, whatever the batch."""
    task, k = tasks(torch.zeros(11, 1, 8, 8), 5, batch=2)
    value = over(task, "flow", lambda t, rows: rate(t, rows)[0])
    x = dequantize(k, 17, -1.0, 1.0, streams(0, task.order.tolist(), VALUE, 0, 0))
    exact = task.reference.log_prob(x.double(), task.model.sde, number(task.model.sde.t_min))
    want = bits_per_dim(exact, 64, 2 / 17)
    torch.testing.assert_close(value.double(), want, rtol=0, atol=2e-3)
    whole = replace(task, how=replace(task.how, batch=5, calls=256))
    torch.testing.assert_close(over(whole, "flow", lambda t, rows: rate(t, rows)[0]), value, rtol=0, atol=1e-6)
    immse = over(whole, "bound", lambda t, rows: bounded(t, rows)["immse"])
    torch.testing.assert_close(immse, want, rtol=0, atol=2e-3)


def test_classes_are_told_by_their_bits():
    """Labels of which 12 in 30 are the class of the greatest exact density of the same draws."""
    g, n = torch.Generator().manual_seed(0), 30
    means = torch.cat([0.12 * torch.randn(10, 1, 8, 8, generator=g), torch.zeros(1, 1, 8, 8)])
    task, k = tasks(means, n, batch=n)
    x = dequantize(k, 17, -1.0, 1.0, streams(0, task.order.tolist(), VALUE, 0, 0)).double()
    best = (x[:, None] - means[:10].double()).flatten(2).square().sum(2).argmin(1)  # all widths are one
    labels = task.labels.clone()
    labels[task.order] = torch.where(torch.arange(n) < 12, best, (best + 1) % 10)
    assert right(replace(task, labels=labels), 10) == 12 / n
