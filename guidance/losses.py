"""Energies of the image alone, and sums of energies."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from guidance.energy import Energy
from guidance.rows import by_rows


@by_rows("energies")
def total(energies: Sequence[Energy], weights: Sequence[float] | None = None) -> Energy:
    """E(x0) = sum_i w_i E_i(x0); without weights the mean: an ensemble of CLIPs, or CLIP and the losses below."""
    if not energies:
        raise ValueError("give at least one energy")
    w = [1 / len(energies)] * len(energies) if weights is None else list(weights)
    if len(w) != len(energies):
        raise ValueError(f"give one weight an energy, got {len(energies)} energies and {len(w)} weights")
    if not all(math.isfinite(k) for k in w):
        raise ValueError(f"the weights must be finite, got {w}")

    def E(x0: Tensor) -> Tensor:
        value = w[0] * energies[0](x0)
        for k, other in zip(w[1:], energies[1:], strict=True):
            value = value + k * other(x0)
        return value

    return E


def total_variation(x0: Tensor) -> Tensor:
    """E = mean over pixels of dx^2 + dy^2, differences to the right and lower neighbour, (B,); x0 (B, C, H, W).

    Squared, so that it is smooth; the mean is over all C H W numbers, an edge pixel has no difference.
    """
    if x0.ndim != 4:
        raise ValueError(f"total variation is of images (B, C, H, W), got {tuple(x0.shape)}; decode latents first")
    dy, dx = x0.diff(dim=2), x0.diff(dim=3)
    return (dy.square().flatten(1).sum(1) + dx.square().flatten(1).sum(1)) / x0[0].numel()


def out_of_range(x0: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """E = mean of (x0 - clamp(x0, low, high))^2, (B,); 0 inside the range."""
    if not high > low:
        raise ValueError(f"the range of values must be low < high, got {low} and {high}")
    return (torch.relu(x0 - high) - torch.relu(low - x0)).square().flatten(1).mean(1)
