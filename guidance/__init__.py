"""Guidance: pure functions Score -> Score (or scores -> score), nestable in any order."""

from guidance import operators
from guidance.anneal import anneal
from guidance.certificate import Certificate, certify
from guidance.cfg import cfg
from guidance.clip import clip_energy, load_clip
from guidance.compose import conjunction, product
from guidance.cutouts import cutouts
from guidance.daps import daps
from guidance.energy import Energy, classifier, energy, mpgd, stages, universal
from guidance.feynman_kac import FeynmanKac, feynman_kac
from guidance.frequency import frequency
from guidance.losses import out_of_range, total, total_variation
from guidance.momentum import apg_momentum
from guidance.nullspace import ddnm, ddnm_plus, ddrm, diffpir
from guidance.picture import gradient_picture
from guidance.posterior import dps, mmps, pigdm, tmpd
from guidance.project import apg, perp_neg, tangential, zero_star
from guidance.rescale import rescale
from guidance.superpose import superpose
from guidance.twisted import twisted
from guidance.weights import plus_plus, ramp

__all__ = [
    "Certificate", "Energy", "FeynmanKac", "anneal", "apg", "apg_momentum", "certify", "cfg", "classifier",
    "clip_energy", "conjunction", "cutouts", "daps", "ddnm", "ddnm_plus", "ddrm", "diffpir", "dps", "energy",
    "feynman_kac", "frequency", "gradient_picture", "load_clip", "mmps", "mpgd", "operators", "out_of_range",
    "perp_neg", "pigdm", "plus_plus", "product", "ramp", "rescale", "stages", "superpose", "tangential",
    "tmpd", "total", "total_variation", "twisted", "universal", "zero_star",
]  # fmt: skip
