"""Weights of quadrature, of differentiation and of Adams steps, in float64."""

import math

import numpy as np
import torch
from torch import Tensor


def fejer(n: int) -> tuple[Tensor, Tensor]:
    """Fejer's second rule on [0, 1]: interior Chebyshev points and weights, (n,) each; those of n are among 2 n + 1."""
    angle = math.pi * torch.arange(1, n + 1, dtype=torch.float64) / (n + 1)
    odd = torch.arange(1, n + 2, 2, dtype=torch.float64)
    weight = 2 / (n + 1) * angle.sin() * (torch.sin(angle[:, None] * odd) / odd).sum(1)
    return (1 - angle.cos()) / 2, weight


def clenshaw_curtis(n: int) -> tuple[Tensor, Tensor]:
    """Clenshaw and Curtis's rule on [0, 1]: Chebyshev points with the ends, and weights, (n,) each, n >= 2."""
    angle = math.pi * torch.arange(n, dtype=torch.float64) / (n - 1)
    k = torch.arange(n, dtype=torch.float64)
    moment = torch.where(k % 2 == 0, 1 / (1 - k * k), 0.0)  # half the integral of T_k over [-1, 1]
    scale = torch.ones_like(k)
    scale[0] = scale[-1] = 0.5
    weight = 2 / (n - 1) * scale * ((scale * moment) * torch.cos(angle[:, None] * k)).sum(1)
    return (1 - angle.cos()) / 2, weight


def derivative(u: Tensor) -> Tensor:
    """(n, n): values at the points u to the slopes there of the polynomial through them   (Berrut & Trefethen 2004)."""
    apart = u[:, None] - u
    size = apart.abs().fill_diagonal_(1.0).log().sum(1)
    sign = apart.sign().fill_diagonal_(1.0).prod(1)
    D = sign[:, None] * sign * torch.exp(size[:, None] - size) / apart.fill_diagonal_(1.0)
    D.fill_diagonal_(0.0)
    return D - torch.diag(D.sum(1))


def adams(u: Tensor, order: int) -> tuple[list[list[float]], list[list[float]]]:
    """Weights of the values at u_i, u_i-1, ... for the step to u_i+1, and of those at u_i+1, u_i, ... for the same."""
    g, gw = np.polynomial.legendre.leggauss(4)
    at = u.numpy()

    def weights(known: list[int], i: int) -> list[float]:
        y, h = at[i] + (at[i + 1] - at[i]) * (g + 1) / 2, (at[i + 1] - at[i]) / 2
        return [
            float(h * (gw * np.prod([(y - at[m]) / (at[k] - at[m]) for m in known if m != k], axis=0)).sum())
            for k in known
        ]

    n = len(at)
    ahead = [weights([i - k for k in range(min(order, i + 1))], i) for i in range(n - 1)]
    back = [weights([i + 1 - k for k in range(min(order, i + 2))], i) for i in range(n - 1)]
    return ahead, back
