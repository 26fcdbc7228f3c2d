"""Guidance: pure functions Score -> Score (or scores -> score), nestable in any order."""

from guidance.certificate import Certificate, certify
from guidance.cfg import cfg
from guidance.clip import clip_energy, load_clip
from guidance.compose import conjunction, product
from guidance.energy import Energy, classifier, energy
from guidance.frequency import frequency
from guidance.project import apg, perp_neg, tangential, zero_star
from guidance.rescale import rescale
from guidance.weights import plus_plus

__all__ = [
    "Certificate", "Energy", "apg", "certify", "cfg", "classifier", "clip_energy", "conjunction", "energy", "frequency",
    "load_clip", "perp_neg", "plus_plus", "product", "rescale", "tangential", "zero_star",
]  # fmt: skip
