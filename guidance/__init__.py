"""Guidance: pure functions Score -> Score (or scores -> score), nestable in any order."""

from guidance.cfg import cfg
from guidance.clip import clip_energy, load_clip
from guidance.compose import conjunction, product
from guidance.energy import Energy, classifier, energy

__all__ = ["Energy", "cfg", "classifier", "clip_energy", "conjunction", "energy", "load_clip", "product"]
