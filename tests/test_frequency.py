"""Guidance by frequency: bands that add up, and a blur against scipy's, its mean and its limits."""

import torch
from guided import D64, C, T, U, X, close
from scipy.ndimage import gaussian_filter

from guidance import cfg, frequency
from guidance.frequency import blur


def test_frequency_is_cfg_in_each_band_and_the_bands_add_up():
    u, d = U(X, T), C(X, T) - U(X, T)
    low, high = frequency(C, U, 1.0, 0.0)(X, T) - u, frequency(C, U, 0.0, 1.0)(X, T) - u
    close(low + high, d)
    assert (low - d).abs().max() > 0.1
    assert (high - d).abs().max() > 0.1
    close(frequency(C, U, 3.0, 3.0)(X, T), cfg(C, U, 3.0)(X, T))
    close(frequency(C, U, 3.0, 8.0)(X, T), u + 3 * low + 8 * high, 1e-11)
    close(frequency(C, U, 0.0, 0.0)(X, T), u)
    assert frequency(C, U, 0.0, 0.0) is U
    close(low, blur(d, 1.0))


def test_frequency_nests_in_any_order():
    a = frequency(frequency(C, U, 2.0, 5.0), U, 3.0, 0.5)(X, T)
    close(a, frequency(frequency(C, U, 3.0, 0.5), U, 2.0, 5.0)(X, T), 1e-11)
    b = cfg(frequency(C, U, 2.0, 5.0), U, 3.0)(X, T)
    close(b, frequency(cfg(C, U, 3.0), U, 2.0, 5.0)(X, T), 1e-11)
    close(b, frequency(C, U, 6.0, 15.0)(X, T), 1e-11)


def test_blur_is_a_mirrored_gaussian():
    for shape in ((2, 3, 12), (2, 3, 9, 14), (2, 1, 8, 7, 9)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=D64)
        sigma = (0, 0, *[2.0] * (len(shape) - 2))
        close(blur(x, 2.0), torch.from_numpy(gaussian_filter(x.numpy(), sigma, mode="reflect", truncate=12)), 1e-7)
    x = X[0].flatten(1)  # (3, 20): signals
    close(blur(x, 2.0), blur(x[:, None], 2.0)[:, 0])


def test_frequency_after_inference_can_be_differentiated():
    with torch.inference_mode():
        blur(X, 1.37)
    x = X.clone().requires_grad_()
    close(torch.autograd.grad(blur(x, 1.37).square().sum() / 2, x)[0], blur(blur(X, 1.37), 1.37))


def test_blur_keeps_the_mean_and_has_its_ends():
    mean = X.mean((2, 3), keepdim=True).expand(X.shape)
    close(blur(X, 1.3).mean((2, 3)), X.mean((2, 3)))
    close(blur(X, 1e3), mean)
    close(blur(X, 1e-9), X)
    close(blur(blur(X, 0.9), 1.2), blur(X, 1.5))  # variances add
    close(blur(X.flip(3), 1.0), blur(X, 1.0).flip(3))
    mix = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=D64)
    close(blur(torch.einsum("ij,bjhw->bihw", mix, X), 1.0), torch.einsum("ij,bjhw->bihw", mix, blur(X, 1.0)))
