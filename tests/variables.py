"""The variables of exponential integrators by their definitions, and times of VP at given levels."""

import math

import mpmath as mp
import torch
from truth import tensor

from samplers.exponential import bounded, level, log_snr, time
from scoresde import VP

INF = math.inf
VARIABLES = {"log_snr": log_snr, "level": level, "time": time, "bounded": bounded(0.6)}


def u_of(name, r):
    """The variables by their definitions, VP's time solved by hand."""
    if name == "log_snr":
        return -mp.log(r)
    if name == "level":
        return r
    if name == "bounded":
        return r / (r + mp.mpf(0.6))
    B = mp.log1p(r**2)  # beta_min t + (beta_max - beta_min) t^2/2 = B
    slope = mp.mpf(20) - mp.mpf(0.1)
    return (mp.sqrt(mp.mpf(0.1) ** 2 + 2 * slope * B) - mp.mpf(0.1)) / slope


def points(*r):
    """Times of VP at these sigma/alpha; 0 is t = 0."""
    r = tensor(r)
    return torch.where(r > 0, VP().time(-torch.log(r.clamp(min=1e-300))), 0.0)
