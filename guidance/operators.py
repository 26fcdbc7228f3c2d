"""Measurement operators A of inverse problems y = A(x0) + noise_sd n.

An operator is a callable (B, *shape) -> (B, *out), each sample on its own.  Any differentiable one will do where a rule
takes non-linear operators; `Linear` ones also know their adjoint A*, and some the singular values of A, and so every
spectral filter A* phi(A A*):

    phi(e) = 1/e where e > 0:  the pseudo-inverse A+;      phi(e) = 1/(e + c):  argmin_x |y - A x|^2 + c |x|^2
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scoresde.types import like, number

Map = Callable[[Tensor], Tensor]
Operator = Callable[[Tensor], Tensor]  # (B, *shape) -> (B, *out)


@dataclass(frozen=True, eq=False)
class Linear:
    """y = A x, sample by sample; build it with a function of this module.

    forward: (B, *shape) -> (B, *out);  adjoint: (B, *out) -> (B, *shape), <A x, v> = <x, A* v>
    shape:   of one x
    filter:  (phi, v) -> A* phi(A A*) v, phi elementwise on eigenvalues e (1, ...), the first axis the batch's (so that
             c (B,) is like(c, e)); None: the singular values are not known
    iterations: of conjugate gradients, where they are not known; dataclasses.replace(A, iterations=50) changes it
    """

    forward: Map
    adjoint: Map
    shape: tuple[int, ...]
    filter: Callable[[Map, Tensor], Tensor] | None = None
    iterations: int = 20

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.shape:
            raise ValueError(f"this operator is for samples of shape {self.shape}, got a batch {tuple(x.shape)}")
        return self.forward(x)

    def ridge(self, v: Tensor, c: float | Tensor) -> Tensor:
        """A* (A A* + c)^-1 v = argmin_x |v - A x|^2 + c |x|^2;  c >= 0, a number, () or (B,).  c = 0 is A+ v.

        Exact where the singular values are known, else by `iterations` conjugate gradients, one A and one A* each:
        exact after as many as A A* has distinct eigenvalues.
        """
        c = number(c)
        if self.filter is None:
            return self.adjoint(cg(lambda u: self(self.adjoint(u)) + like(c, u) * u, v, self.iterations))
        return self.filter(lambda e: _inverse(e, like(c, e)), v)

    def pinv(self, v: Tensor) -> Tensor:
        """A+ v, the pseudo-inverse; see `ridge`."""
        return self.ridge(v, 0.0)


def mask(m: Tensor) -> Linear:
    """The entries where m is 1, as (B, k).  A A* = 1, A+ = A*.

    m: 0 or 1, of the shape of one sample (use expand)
    """
    if not bool(((m == 0) | (m == 1)).all()) or not bool(m.any()):
        raise ValueError(f"a mask is 0 or 1, and 1 somewhere; got values in [{float(m.min())}, {float(m.max())}]")
    shape, D, index = tuple(m.shape), m.numel(), _copies(m.detach().flatten().nonzero()[:, 0])

    def adjoint(v: Tensor) -> Tensor:
        return v.new_zeros(len(v), D).index_copy(1, index(v), v).reshape(-1, *shape)

    return Linear(lambda x: x.flatten(1).index_select(1, index(x)), adjoint, shape, _constant(1.0, adjoint))


def blur(kernel: Tensor | float, shape: tuple[int, ...]) -> Linear:
    """Convolution over the last axes, periodic at the ends: in Fourier space A = K, A A* = |K|^2.

    kernel: of as many axes as are blurred (h, w), its centre at size // 2; or the standard deviation, in grid points,
            of a Gaussian over every spatial axis (all but the first; of one axis, that)
    """
    shape = tuple(shape)
    if not isinstance(kernel, Tensor):
        if not 0 < kernel < math.inf:
            raise ValueError(f"the blur's width, in grid points, must be positive and finite, got {kernel}")
        line = torch.arange(-math.ceil(6 * kernel), math.ceil(6 * kernel) + 1, dtype=torch.float64)
        line = torch.exp(-0.5 * (line / kernel) ** 2)
        kernel = (line / line.sum()).reshape(-1)
        for _ in _space(shape)[1:]:
            kernel = kernel[..., None] * line / line.sum()
    k = kernel.detach().to("cpu", torch.float64)
    if not 0 < k.ndim <= len(shape):
        raise ValueError(
            f"a kernel of {k.ndim} axes cannot blur samples of shape {shape}; give one axis for each blurred"
        )
    axes, sizes = tuple(range(-k.ndim, 0)), shape[-k.ndim :]
    place = torch.zeros(sizes, dtype=torch.float64)
    at = torch.meshgrid(*[(torch.arange(n) - n // 2) % N for n, N in zip(k.shape, sizes, strict=True)], indexing="ij")
    K = torch.fft.rfftn(place.index_put_(at, k, accumulate=True))
    gain = _copies(K.reshape((1,) * (1 + len(shape) - k.ndim) + K.shape))

    def times(c: Tensor, v: Tensor) -> Tensor:
        return torch.fft.irfftn(c * torch.fft.rfftn(v, dim=axes), s=sizes, dim=axes)

    def filter(phi: Map, v: Tensor) -> Tensor:
        return times(gain(v).conj() * phi(gain(v).abs().square()), v)

    return Linear(lambda x: times(gain(x), x), lambda v: times(gain(v).conj(), v), shape, filter)


def downsample(factor: int, shape: tuple[int, ...]) -> Linear:
    """The mean of every cell of factor^n points, n spatial axes (all but the first; of one axis, that).

    A A* = factor^-n; A+ repeats each value over its cell.  The box average is the antialiasing.
    """
    shape = tuple(shape)
    space = _space(shape)
    if factor < 1 or any(shape[a] % factor for a in space):
        raise ValueError(f"factor must divide every spatial size of {shape}, got {factor}")
    n = factor ** len(space)
    cells = shape[: space[0]] + tuple(m for a in space for m in (shape[a] // factor, factor))
    inner = tuple(1 + space[0] + 2 * i + 1 for i in range(len(space)))  # axes within a cell, in (B, *cells)

    def adjoint(v: Tensor) -> Tensor:
        for a in inner:
            v = v.unsqueeze(a)
        return (v / n).expand(len(v), *cells).reshape(-1, *shape)

    return Linear(lambda x: x.reshape(-1, *cells).mean(inner), adjoint, shape, _constant(1 / n, adjoint))


def gray(shape: tuple[int, ...]) -> Linear:
    """The mean of the channels, (B, C, ...) -> (B, 1, ...): colourisation is its inverse.  A A* = 1/C."""
    shape = tuple(shape)
    C = shape[0]

    def adjoint(v: Tensor) -> Tensor:
        return (v / C).expand(-1, *shape)

    return Linear(lambda x: x.mean(1, keepdim=True), adjoint, shape, _constant(1 / C, adjoint))


def linear(function: Map, shape: tuple[int, ...], example: Tensor | None = None) -> Linear:
    """Any linear map of torch, with its adjoint by autograd: A* v = vjp of the function at 0.

    example: a tensor of the device and dtype the function wants; default float64 on the CPU
    Checked once, on random vectors: linear (no offset either), and each sample on its own.
    """
    shape = tuple(shape)
    x = _random(2, shape, example)
    y, tol = function(x), 100 * torch.finfo(x.dtype).eps ** 0.75
    if not _near(function(x[1:]), y[1:], tol * float(y.abs().max())):
        raise ValueError("the function mixes samples: a sample alone gives another value than in a batch")
    both = torch.stack([2 * x[0] - 3 * x[1], torch.zeros_like(x[0])])
    want = torch.stack([2 * y[0] - 3 * y[1], torch.zeros_like(y[0])])
    if not _near(function(both), want, tol * float(y.abs().max())):
        raise ValueError(
            "the function is not linear, f(2 a - 3 b) != 2 f(a) - 3 f(b) or f(0) != 0; a differentiable non-linear "
            "operator is used as it stands, by rules that take one"
        )

    def adjoint(v: Tensor) -> Tensor:
        _, pull = torch.func.vjp(function, v.new_zeros(len(v), *shape))  # type: ignore[misc]
        return pull(v)[0]

    return Linear(function, adjoint, shape)


def physics(obj: Any, shape: tuple[int, ...], example: Tensor | None = None) -> Operator:
    """A physics object of deepinv as an operator, without its noise: anything with `.A`, and `.A_adjoint` if linear.

    example: a tensor of the device and dtype the object wants; default float64 on the CPU
    Returns a `Linear` where there is an adjoint, checked once on random vectors, else x -> obj.A(x).
    """
    if not callable(getattr(obj, "A", None)):
        raise ValueError(
            f"{type(obj).__name__} has no method A(x); any differentiable function is an operator as it is"
        )
    if not callable(getattr(obj, "A_adjoint", None)):
        return lambda x: obj.A(x)
    made = linear(lambda x: obj.A(x), shape, example)
    x = _random(2, made.shape, example)
    y = made(x)
    v = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    gap = (y * v).sum() - (x * obj.A_adjoint(v)).sum()
    if float(gap.abs()) > 100 * torch.finfo(x.dtype).eps ** 0.75 * float(y.norm() * v.norm()):
        raise ValueError(
            f"A_adjoint of {type(obj).__name__} is not the adjoint of A: <A x, v> and <x, A* v> differ by "
            f"{float(gap):.3g}; use linear(obj.A, shape), whose adjoint is made by autograd"
        )
    return replace(made, adjoint=lambda v: obj.A_adjoint(v))


def spectral(A: Linear, example: Tensor | None = None) -> Linear:
    """The same operator with its singular values, by one dense decomposition: `ddrm` needs them, `ridge` becomes exact.

    For D numbers and M measured D M min(D, M) work and D M memory: a few thousand of each.
    """
    eye = torch.eye(math.prod(A.shape), dtype=torch.float64).reshape(-1, *A.shape)
    matrix = A(eye if example is None else eye.to(example)).flatten(1).T
    U, S, Vh = (_copies(q) for q in torch.linalg.svd(matrix.detach().to("cpu", torch.float64), full_matrices=False))

    def filter(phi: Map, v: Tensor) -> Tensor:
        return (S(v) * phi(S(v).square()[None]) * (v.flatten(1) @ U(v)) @ Vh(v)).reshape(-1, *A.shape)

    return replace(A, filter=filter)


def cg(product: Map, v: Tensor, iterations: int, least: float = 0.0) -> Tensor:
    """u with product(u) = v by conjugate gradients, for each sample on its own   (Hestenes & Stiefel 1952).

    product: symmetric, positive semi-definite, (B, ...) -> (B, ...)
    least:   what its eigenvalues are at least.  Where a direction p denies it, <p, product(p)> <= least |p|^2 / 2, the
             product is not what it should be (a network's Jacobian is no covariance), and the sample stops
    A fixed number of products, so nothing waits for the device; a sample also stops once its residual is at rounding.
    """
    u, r, p = torch.zeros_like(v), v, v
    rr = _dot(r, r)
    floor = rr * torch.finfo(v.dtype).eps ** 2
    for _ in range(iterations):
        q = product(p)
        curve = _dot(p, q)
        on = (rr > floor) & (curve > 0.5 * least * _dot(p, p))
        step = torch.where(on, rr / torch.where(on, curve, 1.0), 0.0)
        u, r = u + step * p, r - step * q
        rr1 = _dot(r, r)
        p = r + torch.where(on, rr1 / torch.where(on, rr, 1.0), 0.0) * p
        rr = torch.where(on, rr1, 0.0)
    return u


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of every sample, (B, 1, ..., 1)."""
    return like((a * b).flatten(1).sum(1), a)


def _constant(value: float, adjoint: Map) -> Callable[[Map, Tensor], Tensor]:
    """A* phi(A A*) v where A A* is one number."""
    return lambda phi, v: adjoint(phi(v.new_full((1,) * v.ndim, value)) * v)


def _inverse(e: Tensor, c: Tensor) -> Tensor:
    """1/(e + c), and 0 where that is 0 to the rounding of the singular values sqrt(e)."""
    none = e + c <= e.amax() * (100 * torch.finfo(e.dtype).eps) ** 2
    return torch.where(none, 0.0, 1 / torch.where(none, 1.0, e + c))


def _copies(value: Tensor) -> Map:
    """x -> value on the device and in the precision of x (integers stay), copied there once."""
    held: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def on(x: Tensor) -> Tensor:
        dtype = value.dtype
        if dtype.is_complex:
            dtype = torch.complex128 if x.dtype == torch.float64 else torch.complex64
        elif dtype.is_floating_point:
            dtype = x.dtype
        key = (x.device, dtype)
        if key not in held:
            with torch.inference_mode(False):  # what is made within it cannot be differentiated later
                held[key] = value.to(*key)
        return held[key]

    return on


def _space(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The spatial axes of one sample."""
    return tuple(range(min(1, len(shape) - 1), len(shape)))


def _random(n: int, shape: tuple[int, ...], example: Tensor | None) -> Tensor:
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x if example is None else x.to(example)


def _near(a: Tensor, b: Tensor, tol: float) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= tol


def measured(A: Operator, y: Tensor, x0: Tensor) -> Tensor:
    """The residual y - A(x0), (B, *out)."""
    out = A(x0)
    if y.shape != out.shape and y.shape != out.shape[1:]:
        raise ValueError(
            f"the measurement y has shape {tuple(y.shape)}, A(x0) {tuple(out.shape)}; give one measurement for all "
            "samples, or one for each"
        )
    return y.to(out) - out


def check_noise(noise_sd: float, positive: bool = False, finite: bool = False) -> None:
    """The measurement's noise: >= 0, or inf where the measurement says nothing."""
    if isinstance(noise_sd, Tensor) or not noise_sd >= 0:
        raise ValueError(
            f"noise_sd, the standard deviation of the measurement's noise, must be a number >= 0, got {noise_sd}"
        )
    if positive and noise_sd == 0:
        raise ValueError("this rule divides by the measurement's noise; noise_sd must be positive")
    if finite and noise_sd == math.inf:
        raise ValueError("noise_sd = inf measures nothing, and this rule needs a measurement; sample the score itself")


def check_linear(A: Operator) -> None:
    if not isinstance(A, Linear):
        raise ValueError(
            f"this rule needs a Linear operator, got {type(A).__name__}; make one by linear(function, shape) of "
            "guidance.operators, or take `dps`, which takes any differentiable function"
        )
