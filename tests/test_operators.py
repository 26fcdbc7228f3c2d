"""Operators: adjoints, pseudo-inverses and ridge solutions against dense matrices, and what they measure."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.ndimage import convolve

from guidance import operators as ops

D64 = torch.float64
SHAPE = (3, 6, 8)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D64)


def close(a, b, tol=1e-12):
    assert a.shape == b.shape
    assert float((a - b).abs().max()) < tol * max(1.0, float(b.abs().max()))


KERNEL = draw(3, 4, seed=1)
ANY = ops.linear(lambda x: x.cumsum(-1)[..., ::2] - x[:, :1, :, :4], SHAPE)
FLAT = ops.linear(lambda x: torch.stack([x[:, 0] + x[:, 1], 2 * x[:, 2], x[:, 2]], 1), (4,))  # rank 2 of 3
KNOWN = {
    "mask": ops.mask(draw(*SHAPE) > 0.3),
    "blur": ops.blur(KERNEL, SHAPE),
    "gaussian blur": ops.blur(0.7, SHAPE),
    "blur of signals": ops.blur(0.8, (9,)),
    "downsample": ops.downsample(2, SHAPE),
    "downsample signals": ops.downsample(3, (9,)),
    "gray": ops.gray(SHAPE),
    "spectral": ops.spectral(ANY),
    "spectral, low rank": ops.spectral(FLAT),
}
ALL = KNOWN | {"linear": replace(ANY, iterations=80), "low rank": replace(FLAT, iterations=3)}
every = pytest.mark.parametrize("A", ALL.values(), ids=ALL)
known = pytest.mark.parametrize("A", KNOWN.values(), ids=KNOWN)


def matrix(A):
    """(M, D), column by column."""
    eye = torch.eye(math.prod(A.shape), dtype=D64)
    return torch.stack([A(e.reshape(1, *A.shape)).flatten() for e in eye], 1)


@every
def test_against_dense_algebra(A):
    """Adjoint, pseudo-inverse and ridge solution are those of the matrix; c one for each sample is the loop."""
    M = matrix(A)
    x = draw(3, *A.shape)
    y = A(x)
    v = draw(*y.shape, seed=2)
    close(y.flatten(1), x.flatten(1) @ M.T)
    close(A.adjoint(v).flatten(1), v.flatten(1) @ M)
    assert A.adjoint(v).shape == x.shape
    pinv = torch.linalg.pinv(M, rtol=1e-10)
    close(A.pinv(y).flatten(1), y.flatten(1) @ pinv.T, 1e-9)
    close(A(A.pinv(y)), y)
    c = torch.tensor([0.05, 0.3, 2.0], dtype=D64)
    together = A.ridge(v, c)
    for i in range(3):
        exact = torch.linalg.solve(M @ M.T + c[i] * torch.eye(len(M), dtype=D64), v[i].flatten()) @ M
        close(together[i].flatten(), exact, 1e-11)
        close(A.ridge(v[i : i + 1], float(c[i])), together[i : i + 1])


@known
def test_pseudo_inverse_of_any_measurement(A):
    """Penrose's four conditions, also where the measurement is in no image of A."""
    v, w = draw(2, *A(draw(1, *A.shape)).shape)
    x = draw(1, *A.shape, seed=3)
    u = draw(1, *A.shape, seed=4)
    close(A.pinv(A(A.pinv(v))), A.pinv(v), 1e-9)
    close((A(A.pinv(v)) * w).sum(), (A(A.pinv(w)) * v).sum(), 1e-10)
    close((A.pinv(A(x)) * u).sum(), (A.pinv(A(u)) * x).sum(), 1e-10)


@known
def test_filter(A):
    """A* phi(A A*) v: phi = 1 is the adjoint, phi(e) = e the adjoint of A A*; phi sees non-negative eigenvalues."""
    y = A(draw(2, *A.shape))
    close(A.filter(torch.ones_like, y), A.adjoint(y))
    close(A.filter(lambda e: e, y), A.adjoint(A(A.adjoint(y))))
    eigenvalues = []
    A.filter(lambda e: eigenvalues.append(e) or e, y)
    assert bool((eigenvalues[0] >= 0).all())
    assert eigenvalues[0].shape[0] == 1


@every
def test_precision_batches_and_derivatives(A):
    x = draw(3, *A.shape)
    y = A(x)
    assert A(x.float()).dtype == A.adjoint(y.float()).dtype == A.pinv(y.float()).dtype == torch.float32
    close(A(x.float()).double(), y, 1e-5)
    close(A(x[1:2]), y[1:2])
    close(A.adjoint(y[1:2]), A.adjoint(y)[1:2])
    close(torch.func.jvp(A, (x,), (x,))[1], y)
    close(torch.func.vjp(A, x)[1](y)[0], A.adjoint(y))
    close(torch.func.jvp(lambda v: A.ridge(v, 0.1), (y,), (y,))[1], A.ridge(y, 0.1), 1e-9)
    with pytest.raises(ValueError, match=r"samples of shape \(.*\), got a batch \(3, 77\)"):
        A(draw(3, 77))


def test_mask_lists_the_known_entries():
    m = torch.tensor([[1, 0, 1], [0, 0, 1]])
    x = draw(2, 2, 3)
    A = ops.mask(m)
    close(A(x), torch.stack([x[:, 0, 0], x[:, 0, 2], x[:, 1, 2]], 1))
    close(A.pinv(A(x)), x * m)


def test_blur_is_a_periodic_convolution():
    x = draw(2, *SHAPE)
    want = torch.stack([torch.from_numpy(convolve(c.numpy(), KERNEL.numpy(), mode="wrap")) for c in x.flatten(0, 1)])
    close(KNOWN["blur"](x), want.reshape(x.shape))
    one = torch.zeros(1, 9, dtype=D64)
    one[0, 0] = 1
    d = torch.minimum(torch.arange(9), 9 - torch.arange(9)).double()
    bump = torch.exp(-0.5 * (d / 0.8) ** 2)
    close(ops.blur(0.8, (9,))(one), (bump / bump.sum())[None], 1e-6)
    big = ops.blur(torch.ones(25, dtype=D64) / 25, (5,))  # wraps around five times
    close(big(draw(1, 5)), draw(1, 5).mean(1, keepdim=True).expand(1, 5))
    volume = draw(1, 2, 4, 5, 3)
    close(ops.blur(0.6, (2, 4, 5, 3))(volume).mean((2, 3, 4)), volume.mean((2, 3, 4)))


def test_downsample_and_gray_are_means():
    x = draw(2, *SHAPE)
    close(KNOWN["downsample"](x), torch.nn.functional.avg_pool2d(x, 2))
    close(
        KNOWN["downsample"].pinv(KNOWN["downsample"](x)),
        KNOWN["downsample"](x).repeat_interleave(2, 2).repeat_interleave(2, 3),
    )
    close(KNOWN["gray"](x), x.mean(1, keepdim=True))


def test_conjugate_gradients():
    """As many steps as distinct eigenvalues, each sample by itself; more change nothing; no curvature, no step."""
    Q = torch.linalg.qr(draw(12, 12)).Q
    e = torch.tensor([1.0, 5.0, 0.01], dtype=D64).repeat(4)
    M = (Q * e) @ Q.T
    v = draw(3, 12, seed=5) * torch.tensor([[1.0], [1e-6], [0.0]], dtype=D64)
    exact = torch.linalg.solve(M, v.T).T
    close(
        ops.cg(lambda u: u @ M, v, 3) / v.norm(dim=1, keepdim=True).clamp(min=1e-9),
        exact / v.norm(dim=1, keepdim=True).clamp(min=1e-9),
        1e-10,
    )
    assert (ops.cg(lambda u: u @ M, v, 2) - exact).abs().max() > 1e-3
    close(ops.cg(lambda u: u @ M, v, 100), exact, 1e-10)
    close(ops.cg(lambda u: u @ M, v[1:2], 3), ops.cg(lambda u: u @ M, v, 3)[1:2])
    assert not ops.cg(lambda u: -u, v, 3).any()
    bent = torch.diag(torch.tensor([2.0, 0.3, -4.0], dtype=D64))
    w = draw(1, 3)
    exact = ops.cg(lambda u: u @ bent, w * torch.tensor([1.0, 1.0, 0.0]), 2, least=0.2)
    close(exact, w * torch.tensor([0.5, 1 / 0.3, 0.0], dtype=D64))
    assert not ops.cg(lambda u: u @ bent, w * torch.tensor([0.0, 1.0, 0.0]), 2, least=0.7).any()
    assert ops.cg(lambda u: u @ bent, w, 9, least=0.2).norm() < 10 * w.norm()  # a step is at most 2/least


class Physics:
    """What deepinv's objects look like: `A`, `A_adjoint`, and noise in `forward`."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def A(self, x):
        return x[..., ::2] * 3

    def A_adjoint(self, y):
        return torch.stack([self.scale * 3 * y, 0 * y], -1).flatten(-2)

    def forward(self, x):
        return self.A(x) + torch.randn(())


def test_physics_objects():
    x = draw(2, 3, 8)
    A = ops.physics(Physics(), (3, 8))
    close(A(x), 3 * x[..., ::2])
    close(A.adjoint(A(x)), torch.func.vjp(A, x)[1](A(x))[0])
    with pytest.raises(ValueError, match="A_adjoint of Physics is not the adjoint of A"):
        ops.physics(Physics(0.9), (3, 8))

    class Opaque(Physics):
        def A(self, x):
            return super().A(x.detach())

    close(ops.physics(Opaque(), (3, 8)).adjoint(A(x)), A.adjoint(A(x)))  # its own adjoint, no autograd

    class Bent:
        def A(self, x):
            return x.sin()

    close(ops.physics(Bent(), (3, 8))(x), x.sin())
    with pytest.raises(ValueError, match="int has no method A"):
        ops.physics(3, (3, 8))


def test_deepinv():
    """Its own objects, linear and not, in both precisions."""
    dinv = pytest.importorskip("deepinv")
    x = draw(2, 3, 8, 8)
    m = (draw(3, 8, 8, seed=1) > 0).double()
    inpaint = ops.physics(dinv.physics.Inpainting((3, 8, 8), mask=m), (3, 8, 8))
    close(inpaint(x), x * m)
    close(inpaint.pinv(inpaint(x)), x * m)
    down = ops.physics(dinv.physics.Downsampling(img_size=(3, 8, 8), factor=2, filter=None), (3, 8, 8))
    close(down(x), x[..., ::2, ::2])
    kernel = torch.tensor([[0.2, 0.5, 0.3]], dtype=D64)
    blurred = ops.physics(dinv.physics.BlurFFT((3, 8, 8), filter=kernel[None, None]), (3, 8, 8))
    exact = ops.blur(kernel, (3, 8, 8))
    v = blurred(x)
    close(blurred.adjoint(v), torch.func.vjp(blurred, x)[1](v)[0], 1e-6)
    assert (
        min(float((v - exact(x)).abs().max()), float((v - ops.blur(kernel.flip(1), (3, 8, 8))(x)).abs().max())) < 1e-6
    )


def test_errors():
    with pytest.raises(ValueError, match=r"0 or 1, and 1 somewhere; got values in \[0.0, 0.5\]"):
        ops.mask(torch.tensor([0.0, 0.5]))
    with pytest.raises(ValueError, match=r"1 somewhere; got values in \[0.0, 0.0\]"):
        ops.mask(torch.zeros(3))
    with pytest.raises(ValueError, match=r"positive and finite, got 0\.0"):
        ops.blur(0.0, SHAPE)
    with pytest.raises(ValueError, match="a kernel of 4 axes cannot blur"):
        ops.blur(draw(1, 1, 3, 3), SHAPE)
    with pytest.raises(ValueError, match=r"divide every spatial size of \(3, 6, 8\), got 4"):
        ops.downsample(4, SHAPE)
    for function in (torch.sin, lambda x: x + 1e-3, lambda x: x.abs()):
        with pytest.raises(ValueError, match="not linear"):
            ops.linear(function, SHAPE)
    with pytest.raises(ValueError, match="mixes samples"):
        ops.linear(lambda x: x.sum(0, keepdim=True).expand(x.shape), SHAPE)
    with pytest.raises(ValueError, match=r"y has shape \(5,\), A\(x0\) \(2, 3, 3, 4\)"):
        ops.measured(KNOWN["downsample"], draw(5), draw(2, *SHAPE))
    with pytest.raises(ValueError, match="number >= 0, got -1"):
        ops.check_noise(-1)
    with pytest.raises(ValueError, match="must be positive"):
        ops.check_noise(0, positive=True)


def test_after_inference_can_be_differentiated():
    A = ops.blur(0.7, (8,))
    with torch.inference_mode():
        A(draw(2, 8).float())
    x = draw(2, 8).float().requires_grad_()
    close(torch.autograd.grad(A(x).square().sum() / 2, x)[0], A.adjoint(A(x)).detach(), 1e-6)
