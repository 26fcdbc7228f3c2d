"""Embedded Runge-Kutta pairs with their own steps for each sample of the batch.

torchdiffeq chooses one step for the whole batch, so a sample's result moves, within the tolerance,
with its batch mates.  Here every sample has its own time and step, and evaluations are still
batched: a sample is the same alone and in any batch.

A sample that has arrived leaves the batch if the field can be asked for some rows only.  A score may
hold things for each of its rows (labels, weights); one that can do without some of them says so:

    score.rows(index)       the score whose row j is row index[j] of this one; index (n,), may repeat
    rowwise(score)          for a score that holds nothing for its rows

Any other score keeps its whole batch to the end: more work, the same result.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.each import Field, Rows, State, power, rms, until_all_arrive
from scoresde.types import Score, like, wide

MARGIN = 0.1
"""Local errors are held to this part of the tolerance, so that the error at the end meets the whole, for most samples:
99 of 100 end within 3.2 tolerances with Dormand and Prince's pair, the worst of 256 within 11 (nine mixtures of
`experiments.problems`, 1e-3 to 1e-7).  `scoresde.adams` keeps them all, with fewer calls."""


@dataclass(frozen=True)
class Pair:
    """y1 = y + h sum B_i k_i,  k_i = f(u + C_i h, y + h sum A_ij k_j),  error h |sum E_i k_i|.

    A begins with the second stage (the first is f(u, y)), C with it; E has one weight more, for
    f(u1, y1), which is the next step's first stage.  C_i = sum_j A_ij.
    order: of y1;  rate: the error estimate falls as h^rate
    E3:    if given, the estimate is h e5^2 / sqrt(e5^2 + e3^2/100)   (Hairer, II.10, eq. 10.17)
    """

    order: int
    rate: int
    C: tuple[float, ...]
    A: tuple[tuple[float, ...], ...]
    B: tuple[float, ...]
    E: tuple[float, ...]
    E3: tuple[float, ...] = ()


BOSH3 = Pair(  # Bogacki & Shampine 1989
    order=3,
    rate=3,
    C=(1 / 2, 3 / 4),
    A=((1 / 2,), (0.0, 3 / 4)),
    B=(2 / 9, 1 / 3, 4 / 9),
    E=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
)
DOPRI5 = Pair(  # Dormand & Prince 1980; Hairer, Norsett & Wanner, Solving ODEs I, table II.5.2
    order=5,
    rate=5,
    C=(1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
    A=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    ),
    B=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    E=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)
TSIT5 = Pair(  # Tsitouras 2011, table 1
    order=5,
    rate=5,
    C=(0.161, 0.327, 0.9, 0.9800255409045097, 1.0),
    A=(
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
    ),
    B=(
        0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774,
    ),
    E=(
        -0.00178001105222577714, -0.0008164344596567469, 0.007880878010261995, -0.1447110071732629,
        0.5823571654525552, -0.45808210592918697, 1 / 66,
    ),
)  # fmt: skip
DOP853 = Pair(  # Dormand & Prince 8(5,3); Hairer, Norsett & Wanner, Solving ODEs I, 2nd edition, II.5 and II.10
    order=8,
    rate=8,
    C=(
        0.05260015195876773, 0.0789002279381516, 0.1183503419072274, 0.2816496580927726, 0.3333333333333333, 0.25,
        0.3076923076923077, 0.6512820512820513, 0.6, 0.8571428571428571, 1.0,
    ),
    A=(
        (
            0.05260015195876773,
        ),
        (
            0.0197250569845379, 0.0591751709536137,
        ),
        (
            0.02958758547680685, 0.0, 0.08876275643042054,
        ),
        (
            0.2413651341592667, 0.0, -0.8845494793282861, 0.924834003261792,
        ),
        (
            0.037037037037037035, 0.0, 0.0, 0.17082860872947386, 0.12546768756682242,
        ),
        (
            0.037109375, 0.0, 0.0, 0.17025221101954405, 0.06021653898045596, -0.017578125,
        ),
        (
            0.03709200011850479, 0.0, 0.0, 0.17038392571223998, 0.10726203044637328, -0.015319437748624402,
            0.008273789163814023,
        ),
        (
            0.6241109587160757, 0.0, 0.0, -3.3608926294469414, -0.868219346841726, 27.59209969944671,
            20.154067550477894, -43.48988418106996,
        ),
        (
            0.47766253643826434, 0.0, 0.0, -2.4881146199716677, -0.590290826836843, 21.230051448181193,
            15.279233632882423, -33.28821096898486, -0.020331201708508627,
        ),
        (
            -0.9371424300859873, 0.0, 0.0, 5.186372428844064, 1.0914373489967295, -8.149787010746927,
            -18.52006565999696, 22.739487099350505, 2.4936055526796523, -3.0467644718982196,
        ),
        (
            2.273310147516538, 0.0, 0.0, -10.53449546673725, -2.0008720582248625, -17.9589318631188,
            27.94888452941996, -2.8589982771350235, -8.87285693353063, 12.360567175794303, 0.6433927460157636,
        ),
    ),
    B=(
        0.054293734116568765, 0.0, 0.0, 0.0, 0.0, 4.450312892752409, 1.8915178993145003, -5.801203960010585,
        0.3111643669578199, -0.1521609496625161, 0.20136540080403034, 0.04471061572777259,
    ),
    E=(
        0.01312004499419488, 0.0, 0.0, 0.0, 0.0, -1.2251564463762044, -0.4957589496572502, 1.6643771824549864,
        -0.35032884874997366, 0.3341791187130175, 0.08192320648511571, -0.022355307863886294, 0.0,
    ),
    E3=(
        -0.18980075407240762, 0.0, 0.0, 0.0, 0.0, 4.450312892752409, 1.8915178993145003, -5.801203960010585,
        -0.4226823213237919, -0.1521609496625161, 0.20136540080403034, 0.02265179219836082, 0.0,
    ),
)  # fmt: skip
PAIRS = {"bosh3": BOSH3, "dopri5": DOPRI5, "tsit5": TSIT5, "dop853": DOP853}


def solve_each(
    rhs: Field,
    y: Tensor,
    u: float,
    u1: float,
    *,
    rtol: float,
    atol: float,
    pair: Pair = DOPRI5,
    rows: Rows | None = None,
    nodes: Tensor | None = None,
    scale: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    max_steps: int = 10_000,
) -> tuple[Tensor, Tensor]:
    """y(u1) from y(u), y (B, ...), and y at the nodes.

    Each row keeps RMS err / (atol + rtol max(|y|, |y1|)) under `MARGIN` times scale(u, y, dy/du).

    rows:  rows(index) is the field of rows index of y, then arrived rows leave; None: they stay
    nodes: (n,) between u and u1, where Hermite's cubic through each step is read -> (n, B, ...)
    scale: what an error is measured by, (B,); default 1

    e the error over what is allowed, e' that of the last step made and p = `pair.rate`, the next step of
    a row is 0.9 e^(-0.7/p) e'^(0.4/p) times the last (Gustafsson 1991), within factors 0.2 and 5; after
    a rejection 0.9 e^(-1/p).  len(B) evaluations a step, plus one; a batch makes as many calls as its
    slowest row.
    """
    at_nodes = y.new_empty(0 if nodes is None else len(nodes), *y.shape)
    if u == u1:
        return y, at_nodes + y
    span = u1 - u

    def step(rhs: Field, index: Tensor, at: Tensor, h: Tensor, y: Tensor, k1: Tensor, last: Tensor) -> State:
        ending = (u1 - at - h) / span <= 1e-12
        h = torch.where(ending, u1 - at, h)
        k, dy = [k1], like(h, y)
        for c, a in zip(pair.C, pair.A, strict=True):
            k.append(rhs(at + c * h, y + dy * _sum(a, k)))
        y1 = y + dy * _sum(pair.B, k)
        at1 = torch.where(ending, u1, at + h)
        k.append(rhs(at1, y1))
        allowed = MARGIN * (atol + rtol * torch.maximum(y.abs(), y1.abs()))
        if scale is not None:
            allowed = allowed * like(scale(at, y, k1), y)
        err = _error(pair, dy, k, allowed)
        finite = torch.isfinite(err)
        accept = finite & (err <= 1)
        err = err.clamp(min=1e-10)
        grow = (0.9 * power(err, -0.7 / pair.rate) * power(last, 0.4 / pair.rate)).clamp(0.2, 5.0)
        shrink = torch.where(finite, 0.9 * power(err, -1 / pair.rate), 0.2).clamp(0.2, 0.9)
        if nodes is not None:
            passed = accept & ((nodes[:, None] - at) * span > 0) & ((nodes[:, None] - at1) * span <= 0)
            n, b = passed.nonzero(as_tuple=True)
            at_nodes[n, index[b]] = _inside((nodes[n] - at[b]) / h[b], dy[b], y[b], y1[b], k1[b], k[-1][b])
        chosen = accept.reshape(-1, *[1] * (y.ndim - 1))
        return (
            torch.where(accept, at1, at),
            h * torch.where(accept, grow, shrink),
            torch.where(chosen, y1, y),
            torch.where(chosen, k[-1], k1),
            torch.where(accept, err.clamp(min=1e-4), last),
        )

    at = torch.full((len(y),), u, dtype=wide(y), device=y.device)
    state = (at, torch.full_like(at, span / 32), y, rhs(at, y), torch.ones_like(at))
    y1 = until_all_arrive(step, rhs, state, u, u1, rtol=rtol, atol=atol, rows=rows, max_steps=max_steps)
    return y1, at_nodes


def _error(pair: Pair, dy: Tensor, k: list[Tensor], allowed: Tensor) -> Tensor:
    """RMS of the step's error over what is allowed, (B,); e5^2 / sqrt(e5^2 + e3^2/100) for a pair with E3."""
    err = rms((dy * _sum(pair.E, k) / allowed).detach()).to(wide(dy))
    if not pair.E3:
        return err
    other = rms((dy * _sum(pair.E3, k) / allowed).detach()).to(err)
    return err * err / (err**2 + 0.01 * other**2).sqrt().clamp(min=torch.finfo(err.dtype).tiny)


def _inside(part: Tensor, dy: Tensor, y: Tensor, y1: Tensor, k: Tensor, k1: Tensor) -> Tensor:
    """y at u + part h by Hermite's cubic; dy is h."""
    w, rise = like(part, y), y1 - y
    return y + w * (rise + (1 - w) * ((1 - w) * (dy * k - rise) - w * (dy * k1 - rise)))


def rows_of(score: Score, index: Tensor) -> Score | None:
    """`score.rows(index)`, the score whose row j is row index[j] of this one; None if it has no such method."""
    some = getattr(score, "rows", None)
    return None if some is None else some(index)


def rowwise(score: Callable[..., Tensor]) -> "Rowwise":
    """The same score (or energy), declared to hold nothing for its rows: it takes any rows, in any number.

    s(x, t) of some rows of x and t must be the same rows of s; labels or weights of shape (B,) inside
    the score break that.
    """
    return Rowwise(score)


class Rowwise:
    """See `rowwise`."""

    def __init__(self, score: Callable[..., Tensor]) -> None:
        self.score = score

    def __call__(self, *args: Tensor) -> Tensor:
        return self.score(*args)

    def rows(self, index: Tensor) -> "Rowwise":
        return self


def _sum(weights: tuple[float, ...], k: list[Tensor]) -> Tensor:
    """sum w_i k_i, element by element in order: the same bits whatever the batch."""
    first, *rest = [(w, v) for w, v in zip(weights, k, strict=True) if w]
    total = first[0] * first[1]
    for w, v in rest:
        total = total + w * v
    return total
