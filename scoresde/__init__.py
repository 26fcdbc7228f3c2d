"""scoresde: score-based diffusion whose samplers, likelihoods and guidance are measured against truth."""

from scoresde.adaptive import rowwise
from scoresde.convert import convert, denoised
from scoresde.exact import Mixture, dataset, gaussian, gaussian_flow, mixture
from scoresde.flow import flow, velocity
from scoresde.likelihood import bits_per_dim, dequantize, log_prob
from scoresde.loss import dsm
from scoresde.model import Model, change_sde, counted, evaluate
from scoresde.noise import Streams
from scoresde.sde import (
    EDM,
    VE,
    VP,
    CosineVP,
    DiscreteVP,
    Straight,
    SubVP,
    cosine_betas,
    linear_betas,
    prior_log_prob,
    prior_sample,
    scaled_linear_betas,
)
from scoresde.types import SDE, Hook, Noise, Score

__all__ = [
    "EDM", "SDE", "VE", "VP", "CosineVP", "DiscreteVP", "Hook", "Mixture", "Model", "Noise", "Score", "Straight",
    "Streams", "SubVP", "bits_per_dim", "change_sde", "convert", "cosine_betas", "counted", "dataset", "denoised",
    "dequantize", "dsm", "evaluate", "flow", "gaussian", "gaussian_flow", "linear_betas", "log_prob", "mixture",
    "prior_log_prob", "prior_sample", "rowwise", "scaled_linear_betas", "velocity",
]  # fmt: skip
