"""The experiment on a network of two seconds: what must hold for any network, holds."""

import torch

from experiments import digits_likelihood
from experiments.digits import load
from scoresde import EDM, Model, Streams, bits_per_dim, dequantize, gaussian, gaussian_of, log_prob


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


def test_rated_items_are_what_the_library_says():
    """A Gaussian model in the place of the network: values by hand, whatever the batch they came in."""
    data, _ = load(None, 0)
    sde = EDM(T=20.0, t_min=0.005)
    target = gaussian(torch.zeros(1, 8, 8), var=0.5)
    exact = target.score(sde)
    model = Model(lambda x, label, y=None: exact(x, torch.exp(4 * label.double())).to(x), sde, "score", classes=10,
                  sigma_data=0.7, label=lambda t: -0.25 * sde.lam(t))  # fmt: skip
    rated = digits_likelihood.Rated(model, data, 5, 0)
    value = rated.flow(24, 1)
    k = data.x[rated.rows]
    x = dequantize(k, 17, -1.0, 1.0, Streams(0, 5))
    t = torch.tensor(sde.t_min, dtype=torch.float64)
    want = bits_per_dim(target.log_prob(x.double(), sde, t), 64, 2 / 17)
    torch.testing.assert_close(value.double(), want, rtol=0, atol=2e-3)
    lp = log_prob(exact, sde, x.double(), method="multistep", steps=24, probes=1, noise=Streams(1, 5), d=0.7)
    torch.testing.assert_close(value.double(), bits_per_dim(lp, 64, 2 / 17), rtol=0, atol=1e-4)
    bound = rated.bound(gaussian_of(data.densities(noise=Streams(0, len(data)))), 256)
    assert (bound[:, 3] - bound[:, :3].sum(1) + torch.log2(torch.tensor(2 / 17))).abs().max() < 1e-4
    assert (bound[:, 3] - want).mean() > -0.05
