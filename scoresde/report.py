"""Error bars of a mean over items, and a report that prints no digit they do not allow.

Item i, rated with the dequantisation draw j and the probes k, is

    v_ijk = mean + a_i + b_ij + c_ijk,     Var v = A + B + C        (items, draws within items, probes within draws)

The mean of n items rated once has the standard error sqrt((A + B + C)/n), which is that of its n values as they are;
repeats of some items tell its parts sqrt(A/n), sqrt(B/n), sqrt(C/n).  The solver's error is no noise: `solver_doubt`
bounds it and it is added to the interval, not to the square.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

from scoresde.files import whole

LEVEL = 0.95
FORMAT = "scoresde-report-1"
ROUNDING = 1e-12  # a bar below this part of its value is 0


class Estimate(NamedTuple):
    """A mean, its standard error and the degrees of freedom of that."""

    value: float
    error: float
    dof: float

    @property
    def half_width(self) -> float:
        """Of the 95 % interval by Student's t."""
        return float(student.ppf((1 + LEVEL) / 2, self.dof)) * self.error


def estimate(values: Tensor, fixed: bool = False) -> Estimate:
    """The mean of values (I,), (I, J) or (I, J, K): items, draws within items, probes within draws.

    fixed=False: the items are a sample.  Standard error s/sqrt(I) of the I item means, I - 1 degrees of freedom; it
                 holds all components, however often an item was rated
    fixed=True:  the items are all there are, and noise is what differs between their R repeats, draws (with the probes
                 in them), or probes if there is one draw.  Items differ in their variances s_i^2, so

                     error^2 = sum_i s_i^2 / (R I^2),     dof = (sum_i s_i^2)^2 (R + 1) / sum_i s_i^4

                 (Satterthwaite 1946, with the unbiased s^4 (R - 1)/(R + 1) of sigma^4; I (R - 1) where all are alike)
    """
    v = _nested(values)
    I, J = v.shape[:2]
    if not fixed:
        if I < 2:
            raise ValueError("the spread between items needs at least 2 of them, got 1; rate more items")
        return Estimate(float(v.mean()), float(v.mean((1, 2)).std()) / math.sqrt(I), I - 1)
    repeats = v.mean(2) if J > 1 else v[:, 0]
    R = repeats.shape[1]
    if R < 2:
        raise ValueError("with the items fixed, all noise is between repeats: rate each item at least twice")
    s2 = repeats.var(1)
    dof = float(s2.sum() ** 2 * (R + 1) / s2.square().sum()) if float(s2.sum()) > 0 else float(I * (R - 1))
    return Estimate(float(v.mean()), math.sqrt(float(s2.sum()) / R) / I, dof)


class Component(NamedTuple):
    """One of the variances A, B, C of a single rating, unbiased, and so below 0 where the truth is near 0."""

    name: str
    variance: float
    error: float  # standard error of the variance, for normal components

    def bar(self, n: int) -> Estimate:
        """Its part sqrt(variance/n) of the standard error of a mean of n items rated once.

        A negative variance counts as 0.  The error reaches up to the part of a variance one standard error higher, so
        it says how large a part that came out as 0 may be.
        """
        part, more = math.sqrt(max(self.variance, 0) / n), math.sqrt((max(self.variance, 0) + self.error) / n)
        return Estimate(part, more - part, math.inf)


def split(values: Tensor) -> list[Component]:
    """Variance components of balanced repeats, (I, J, K): items, draws within items, probes within draws.

    I >= 2.  J = 1 or K = 1: not repeated, and left out of the list; what it adds is then in the component before it
    (nothing, where there is no such noise: an exact trace).  With the mean squares (Scheffe 1959, sec. 7.6)

        C = MS_k,   B = (MS_j - MS_k)/K,   A = (MS_i - MS_j)/(J K)

    Unbiased each, whatever the distributions.  Their sum is the variance of an item rated once.
    """
    v = _nested(values)
    I, J, K = v.shape
    if I < 2:
        raise ValueError(f"a split needs at least 2 items, got values of shape {tuple(values.shape)}")
    each, item = v.mean(2, keepdim=True), v.mean((1, 2), keepdim=True)
    found = [("items", J * K, float(J * K * item.var(0).sum()), I - 1)]
    if J > 1:
        found.append(("draws", K, float(K * (each - item).square().sum()) / (I * (J - 1)), I * (J - 1)))
    if K > 1:
        found.append(("probes", 1, float((v - each).square().sum()) / (I * J * (K - 1)), I * J * (K - 1)))
    out = []
    for (name, size, ms, dof), (_, _, below, dof1) in zip(found, [*found[1:], ("", 1, 0.0, 1)], strict=True):
        error = math.sqrt(2 * ms**2 / dof + 2 * below**2 / dof1) / size
        out.append(Component(name, (ms - below) / size, error))
    return out


def solver_doubt(value: Tensor, refined: Tensor) -> float:
    """What the solver may add to the mean: value and refined (I,), the same items, draws and probes.

        2 (|mean| + half-width of the 95 % interval)     of refined - value

    refined was solved with half the tolerance or twice the steps; of errors that fall in proportion, the slowest there
    is, the difference then is half.
    """
    moved = estimate(refined - value)
    return 2 * (abs(moved.value) + moved.half_width)


@dataclass(frozen=True)
class Row:
    """One figure with its bars.

    error: standard error; None: unknown, and printed so.  0 for what is exact
    doubt: how far the solver may be off, in the same unit, not a standard deviation; None: unknown, and printed so
    dof:   degrees of freedom of the standard error
    """

    name: str
    value: float
    error: float | None = None
    unit: str = ""
    note: str = ""
    doubt: float | None = None
    dof: float = math.inf

    def __post_init__(self) -> None:
        bars = [b for b in (self.error, self.doubt) if b is not None]
        if not math.isfinite(self.value) or any(not 0 <= b < math.inf for b in bars) or not self.dof > 0:
            raise ValueError(f"{self.name}: a value is finite, its bars are >= 0 or None for unknown; got {self!r}")

    @property
    def half_width(self) -> float | None:
        """Of the 95 % interval, with what is known of the solver's doubt added; None without a standard error."""
        if self.error is None:
            return None
        return Estimate(self.value, self.error, self.dof).half_width + (self.doubt or 0)

    def cells(self) -> tuple[str, str, str, str]:
        """(value, standard error, solver's doubt, 95 % interval) as printed.

        Bars have two digits, rounded up; the value ends where the larger bar does, its interval too, rounded outwards.
        A value of which no bar is known gets three digits.
        """
        bar = max((b for b in (self.error, self.doubt) if b is not None), default=None)
        error, doubt = ("unknown" if b is None else _bar(b, self.value) for b in (self.error, self.doubt))
        if bar is None or bar <= ROUNDING * abs(self.value):
            return (f"{self.value:.3g}" if bar is None else f"{self.value:.6g}"), error, doubt, ""
        place = _place(bar)
        half = self.half_width
        if half is None:
            return _fixed(self.value, place), error, doubt, ""
        unit = 10.0**place
        low = math.floor((self.value - half) / unit + 1e-9) * unit
        high = math.ceil((self.value + half) / unit - 1e-9) * unit
        return _fixed(self.value, place), error, doubt, f"{_fixed(low, place)} to {_fixed(high, place)}"

    def __str__(self) -> str:
        value, error, doubt, interval = self.cells()
        between = f" (95 %: {interval})" if interval else ""
        return f"{self.name}: {value} ± {error} {self.unit}".rstrip() + f"{between}, solver ± {doubt}"


@dataclass(frozen=True)
class Report:
    """Figures with their bars; the first is the main one.  `str` is a line, `table` all of it, `save` a JSON file."""

    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("a report needs at least one row")

    def __str__(self) -> str:
        return str(self.rows[0])

    def __getitem__(self, name: str) -> Row:
        """The row of this name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {', '.join(row.name for row in self.rows)}")

    def table(self) -> str:
        head = ("", "value", "± standard error", "± solver", "95 % interval", "unit", "")
        lines = [head, *((row.name, *row.cells(), row.unit, row.note) for row in self.rows)]
        width = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(line, width, strict=True)).rstrip() for line in lines)

    def save(self, path: str | Path) -> None:
        """As JSON; unknown bars are null, and so are infinite degrees of freedom."""
        rows = [{**asdict(row), "dof": row.dof if math.isfinite(row.dof) else None} for row in self.rows]
        with whole(path) as temporary:
            temporary.write_text(json.dumps({"format": FORMAT, "rows": rows}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        try:
            data = json.loads(Path(path).read_text())
            if data["format"] != FORMAT:
                raise ValueError(data["format"])
            rows = [Row(**{**row, "dof": math.inf if row["dof"] is None else row["dof"]}) for row in data["rows"]]
        except (KeyError, TypeError, ValueError) as err:
            raise ValueError(f"{path} is not a report written by Report.save ({err})") from err
        return cls(tuple(rows))


def means(name: str, values: Tensor, unit: str, note: str = "", doubt: float | None = 0.0) -> Row:
    """The row of a mean over items (I,); of one item alone the standard error is unknown."""
    if len(values) < 2:
        return Row(name, float(values.double().mean()), None, unit, note, doubt)
    mean = estimate(values)
    return Row(name, mean.value, mean.error, unit, note, doubt, mean.dof)


def parts(components: Sequence[Component], n: int, unit: str) -> list[Row]:
    """Rows of a split: what each component adds to the standard error of a mean of n items rated once."""
    rows = []
    for c in components:
        note = f"variance {c.variance:.2g}: counted as 0, not told from it" if c.variance < 0 else ""
        part = c.bar(n)
        rows.append(Row(f"standard error from {c.name}", part.value, part.error, unit, note, 0.0))
    return rows


def _nested(values: Tensor) -> Tensor:
    v = values.detach().to("cpu", torch.float64)
    if not 1 <= v.ndim <= 3 or v.numel() == 0:
        raise ValueError(
            f"values must be (items,), (items, draws) or (items, draws, probes), got {tuple(values.shape)}"
        )
    if not bool(torch.isfinite(v).all()):
        raise ValueError(
            f"values must be finite, item {int((~torch.isfinite(v)).nonzero()[0, 0])} is not; rate it anew"
        )
    return v.reshape(*v.shape, *[1] * (3 - v.ndim))


def _place(bar: float) -> int:
    """The power of ten of the second digit of a bar rounded up to two."""
    place = math.floor(math.log10(bar)) - 1
    return place + (math.ceil(bar / 10.0**place - 1e-9) >= 100)


def _bar(bar: float, value: float) -> str:
    if bar <= ROUNDING * abs(value):
        return "0"
    place = _place(bar)
    return _fixed(math.ceil(bar / 10.0**place - 1e-9) * 10.0**place, place)


def _fixed(value: float, place: int) -> str:
    """value rounded to a multiple of 10^place."""
    return f"{round(value, -place) + 0.0:.{max(0, -place)}f}"
