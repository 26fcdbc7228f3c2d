"""Bars against truth: coverage of simulated and real ratings, expectations of the components, printed digits."""

import math
import re

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from truth import F64, tensor

from scoresde import VP, Streams, dequantize, log_prob, mixture
from scoresde.report import Report, Row, estimate, means, parts, solver_doubt, split

PLANE = mixture(tensor(0.3, 0.7), tensor([[-0.5, 0.2], [0.4, -0.3]]), var=tensor([[0.02, 0.05], [0.06, 0.03]]))


def nested(n, shape, A, B, C, seed=0):
    """n repeats of values (I, J, K) = 2 + a_i + b_ij + c_ijk of these variances."""
    I, J, K = shape
    g = torch.Generator().manual_seed(seed)
    z = [torch.randn(n, *s, generator=g, dtype=F64) for s in ((I, 1, 1), (I, J, 1), (I, J, K))]
    return 2 + math.sqrt(A) * z[0] + math.sqrt(B) * z[1] + math.sqrt(C) * z[2]


def printed(row):
    """(low, high) of the interval as it stands in the line."""
    low, high = re.search(r"95 %: (\S+) to (\S+?)\)", str(row)).groups()
    return float(low), float(high)


def coverage(rows, truth):
    hit = [low <= truth <= high for low, high in map(printed, rows)]
    return sum(hit) / len(hit)


@pytest.mark.parametrize(
    ("shape", "A", "B", "C"), [((8, 1, 1), 1, 0.5, 0.2), ((6, 3, 2), 0.3, 1, 1), ((30, 2, 4), 0, 0, 1)]
)
def test_printed_intervals_of_random_items_cover_the_mean(shape, A, B, C):
    values = nested(2000, shape, A, B, C)
    rows = [Row("x", *estimate(v)[:2], doubt=0.0, dof=estimate(v).dof) for v in values]
    assert 0.93 <= coverage(rows, 2.0) <= 0.97


@pytest.mark.parametrize("shape", [(3, 1, 4), (3, 4, 1), (4, 3, 2)])
def test_printed_intervals_of_fixed_items_cover_the_mean_of_those(shape):
    """Items that differ much among themselves, and in their noise: only the repeats tell it."""
    values = nested(2000, shape, 0, 1 if shape[1] > 1 else 0, 4)
    values = (values - 2) * torch.linspace(0.5, 1.5, shape[0], dtype=F64)[:, None, None]
    offset = 100 * torch.arange(shape[0], dtype=F64)[:, None, None]
    rows = [Row("x", *estimate(v + offset, True)[:2], doubt=0.0, dof=estimate(v + offset, True).dof) for v in values]
    assert 0.93 <= coverage(rows, float(offset.mean())) <= 0.97


def test_degrees_of_freedom_by_satterthwaite():
    v = tensor([[0.0, 1.0, 5.0], [1.0, 6.0, 2.0], [5.0, 0.0, 1.0], [7.0, 3.0, 2.0]])
    v = v / v.std(1, keepdim=True)
    found = estimate(v, fixed=True)
    assert (
        abs(found.dof - 4 * (3 + 1)) < 1e-9
    )  # I (R + 1): equal s^2, whose squares overstate sigma^4 by (R + 1)/(R - 1)
    assert abs(found.error - math.sqrt(1 / 12)) < 1e-12
    assert abs(found.half_width - student.ppf(0.975, 16) * found.error) < 1e-12


@pytest.mark.parametrize(("shape", "A", "B", "C"), [((5, 3, 2), 1.0, 0.5, 0.3), ((4, 2, 3), 0.0, 0.2, 1.0)])
def test_components_are_unbiased_and_their_errors_are_their_spread(shape, A, B, C):
    found = [split(v) for v in nested(4000, shape, A, B, C, seed=1)]
    for i, (name, truth) in enumerate((("items", A), ("draws", B), ("probes", C))):
        v = tensor([f[i].variance for f in found])
        assert {f[i].name for f in found} == {name}
        assert abs(float(v.mean()) - truth) < 4 * float(v.std()) / math.sqrt(len(v))
        squares = tensor([f[i].error ** 2 for f in found]).mean()
        # E[MS^2] = (1 + 2/dof) (E MS)^2, so the squared error is that much above the variance
        assert 1 < float(squares) / float(v.var()) < 1 + 2 / (shape[0] - 1) + 0.25


def test_what_is_not_repeated_is_in_the_component_before():
    A, B, C = 1.0, 0.5, 0.3
    one = nested(4000, (5, 3, 1), A, B, C, seed=2)
    two = nested(4000, (5, 1, 3), A, B, C, seed=3)
    for values, names, truth in ((one, ["items", "draws"], [A, B + C]), (two, ["items", "probes"], [A + B, C])):
        found = [split(v) for v in values]
        assert [c.name for c in found[0]] == names
        for i, expected in enumerate(truth):
            v = tensor([f[i].variance for f in found])
            assert abs(float(v.mean()) - expected) < 4 * float(v.std()) / math.sqrt(len(v))


def test_components_add_up_to_the_variance_of_one_rating():
    """Exactly: sum of components x (what a mean of n has) = the square of its standard error, J = K = 1."""
    v = nested(1, (7, 1, 1), 1, 1, 1)[0]
    (only,) = split(v)
    assert abs(only.bar(7).value - estimate(v).error) < 1e-12
    v = nested(1, (7, 3, 2), 1, 1, 1)[0]
    A, B, C = (c.variance for c in split(v))
    error2 = (A + B / 3 + C / 6) / 7  # of the mean of all, by the components
    assert abs(error2 - estimate(v).error ** 2) < 1e-12


def test_a_negative_component_is_said_to_be():
    v = tensor([[[0.0], [1.0]], [[1.0], [0.0]], [[0.0], [1.1]]])  # items alike, draws apart
    items, draws = split(v)
    assert items.variance < 0 < draws.variance
    row = parts([items, draws], 10, "nats")[0]
    assert row.value == 0
    assert row.error > 0
    assert "counted as 0" in row.note


def test_real_probe_noise_is_covered():
    """Items fixed, Rademacher probes the only noise; the exact trace on the same path is the truth."""
    n, I, K = 1000, 4, 4
    x = PLANE.sample(I, 3)
    how = {"method": "multistep", "steps": 24}
    truth = float(log_prob(PLANE.score(VP()), VP(), x, **how).mean())
    rows = x.repeat_interleave(n * K, 0)
    noise = Streams(0, len(rows))
    values = log_prob(PLANE.score(VP()), VP(), rows, probes=1, kind="rademacher", noise=noise, **how)
    values = values.reshape(I, n, 1, K).transpose(0, 1)
    assert float(split(values[0])[1].variance) > 1e-3  # there is noise to speak of
    found = [estimate(v, fixed=True) for v in values]
    assert 0.93 <= coverage([Row("nats", f.value, f.error, doubt=0.0, dof=f.dof) for f in found], truth) <= 0.97


def test_real_ratings_of_random_items_are_covered():
    """Items, dequantisation and probes; the truth is the expectation of log p over cells, by quadrature."""
    levels, low, high, n, I = 12, -2.0, 2.0, 1000, 25
    sde = VP()
    x = PLANE.sample(n * I, 1)
    k = ((x - low) * levels / (high - low)).floor().clamp(0, levels - 1).to(F64)
    noise = Streams(2, n * I)
    y = dequantize(k, levels, low, high, noise)
    values = log_prob(PLANE.score(sde), sde, y, method="multistep", steps=24, probes=1, kind="gaussian", noise=noise)
    found = [means("nats", v, "nats") for v in values.reshape(n, I)]
    assert 0.93 <= coverage(found, expected_log_prob(sde, levels, low, high)) <= 0.97


def expected_log_prob(sde, levels, low, high):
    """sum over cells of P(cell) x (mean of log p over it); the outer cells hold what lies beyond."""
    edges = torch.linspace(low, high, levels + 1, dtype=F64)
    cdf = torch.special.ndtr((edges - PLANE.means[..., None]) / PLANE.eig.sqrt()[..., None])  # (2, 2, levels + 1)
    cdf[..., 0], cdf[..., -1] = 0, 1
    mass = torch.einsum("k,ki,kj->ij", PLANE.log_weights.exp(), *cdf.diff(dim=-1).unbind(1))
    g, w = (torch.from_numpy(q) for q in np.polynomial.legendre.leggauss(8))
    points = (edges[:-1, None] + (g + 1) / 2 * (edges[1] - edges[0])).flatten()
    weight = (
        (mass.repeat_interleave(8, 0).repeat_interleave(8, 1)) * torch.outer(w.repeat(levels), w.repeat(levels)) / 4
    )
    grid = torch.cartesian_prod(points, points)
    log_p = PLANE.log_prob(grid, sde, tensor(sde.t_min)).reshape(weight.shape)
    assert abs(float(weight.sum()) - 1) < 1e-12
    return float((weight * log_p).sum())


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (Row("a", 1.76749, 0.0118, doubt=0.00094), ("1.767", "0.012", "0.00094", "1.743 to 1.792")),
        (Row("b", 1.76749, 0.0118, doubt=0.0), ("1.767", "0.012", "0", "1.744 to 1.791")),
        (Row("c", 1.76749, 0.0001, doubt=0.041), ("1.767", "0.00010", "0.041", "1.726 to 1.809")),
        (Row("d", 1.76749, None, doubt=0.04), ("1.767", "unknown", "0.040", "")),
        (Row("e", 1.76749, 0.2), ("1.77", "0.20", "unknown", "1.37 to 2.16")),
        (Row("f", 1.76749), ("1.77", "unknown", "unknown", "")),
        (Row("g", 4.087462841, 0.0, doubt=0.0), ("4.08746", "0", "0", "")),
        (Row("h", 12345.6, 234.0, doubt=0.0), ("12350", "240", "0", "11880 to 12810")),
        (Row("i", -0.0004, 0.0996, doubt=0.0), ("0.00", "0.10", "0", "-0.20 to 0.20")),
        (Row("j", 2.5, 1e-17, doubt=0.0), ("2.5", "0", "0", "")),
        (Row("k", 1.0, 0.1, doubt=0.0, dof=1), ("1.00", "0.10", "0", "-0.28 to 2.28")),  # t = 12.706
    ],
)
def test_digits_end_where_the_bar_does(row, cells):
    assert row.cells() == cells


def test_unknown_bars_say_so():
    assert str(Row("v", 1.76749, 0.0118, "nats", doubt=0.0009)) == (
        "v: 1.767 ± 0.012 nats (95 %: 1.743 to 1.792), solver ± 0.00090"
    )
    assert "solver ± unknown" in str(Row("v", 1.76749, 0.0118))
    assert "± unknown bits" in str(Row("v", 1.7, None, "bits", doubt=0.1))
    assert means("v", tensor([1.5]), "nats").error is None


def test_solver_doubt_is_twice_the_difference_and_its_bar():
    a = tensor([1.0, 2.0, 3.0, 4.0])
    b = a + tensor([0.1, 0.2, 0.1, 0.2])
    expected = 2 * (0.15 + student.ppf(0.975, 3) * tensor([0.1, 0.2, 0.1, 0.2]).std().item() / 2)
    assert abs(solver_doubt(a, b) - expected) < 1e-12
    assert abs(solver_doubt(b, a) - expected) < 1e-12
    order1 = 1 + 0.3 * 2.0 ** -torch.arange(2, dtype=F64)  # errors h and h/2
    assert solver_doubt(order1[0].expand(3), order1[1].expand(3)) >= 0.3 - 1e-12


def test_a_report_is_a_line_a_table_and_a_file(tmp_path):
    report = Report((Row("ODE", 1.76749, 0.0118, "bits/dim", "of 364", 0.0009, 363), Row("VLB", 1.84, None)))
    assert str(report) == str(report.rows[0])
    lines = report.table().splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["ODE", "VLB"]
    assert all(word in lines[1] for word in ("1.767", "0.012", "0.00090", "1.743 to 1.792", "bits/dim", "of 364"))
    report.save(tmp_path / "sub" / "r.json")
    assert Report.load(tmp_path / "sub" / "r.json") == report
    assert report["VLB"].value == 1.84
    with pytest.raises(KeyError, match="no row 'x'; there are ODE, VLB"):
        report["x"]
    for text in ("{}", "nonsense", '{"format": "scoresde-report-1", "rows": [{"name": "a"}]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="not a report written by"):
            Report.load(tmp_path / "bad.json")


def test_refused():
    with pytest.raises(ValueError, match="bars are >= 0 or None for unknown"):
        Row("v", math.nan, 0.1)
    with pytest.raises(ValueError, match="bars are >= 0 or None for unknown"):
        Row("v", 1.0, -0.1)
    with pytest.raises(ValueError, match="at least one row"):
        Report(())
    with pytest.raises(ValueError, match="at least 2 of them, got 1"):
        estimate(tensor([1.0]))
    with pytest.raises(ValueError, match="rate each item at least twice"):
        estimate(tensor([1.0, 2.0]), fixed=True)
    with pytest.raises(ValueError, match="at least 2 items"):
        split(tensor([[1.0, 2.0]]))
    with pytest.raises(ValueError, match="item 1 is not"):
        split(tensor([[1.0, 2.0], [1.0, math.nan]]))
    with pytest.raises(ValueError, match="must be \\(items,\\)"):
        estimate(torch.zeros(2, 2, 2, 2))
