"""scoresde: score-based diffusion whose samplers, likelihoods and guidance are measured against truth."""

from scoresde.adaptive import rowwise
from scoresde.bounds import bounds, chain_bound
from scoresde.convert import convert, denoised
from scoresde.discrete import bits_per_dim, code_length, dequantize
from scoresde.exact import Mixture, dataset, gaussian, gaussian_flow, gaussian_of, mixture
from scoresde.flow import between, decode, encode, flow, velocity
from scoresde.latent import latent_log_prob
from scoresde.likelihood import change, log_prob, sample_log_prob
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
    "Streams", "SubVP", "between", "bits_per_dim", "bounds", "chain_bound", "change", "change_sde", "code_length",
    "convert", "cosine_betas", "counted", "dataset", "decode", "denoised", "dequantize", "dsm", "encode", "evaluate",
    "flow", "gaussian", "gaussian_flow", "gaussian_of", "latent_log_prob", "linear_betas", "log_prob", "mixture",
    "prior_log_prob", "prior_sample", "rowwise", "sample_log_prob", "scaled_linear_betas", "velocity",
]  # fmt: skip
