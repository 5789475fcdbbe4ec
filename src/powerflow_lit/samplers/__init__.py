"""Ways of drawing responses from a model: plain decodings and the paper's inference-time rows."""

from powerflow_lit.samplers.base import Draws, EvaluationSettings, Policy, Progress, Sampler
from powerflow_lit.samplers.decoding import Decoding
from powerflow_lit.samplers.power import PowerSampling
from powerflow_lit.samplers.verbalized import VerbalizedSampling

__all__ = [
    "Decoding",
    "Draws",
    "EvaluationSettings",
    "Policy",
    "PowerSampling",
    "Progress",
    "Sampler",
    "VerbalizedSampling",
]
