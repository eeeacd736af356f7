"""Schema and fake of hamburger."""

from __future__ import annotations

from .._register import register_inference
from .reference import hamburger

register_inference(
    "hamburger(Tensor x, Tensor ham_in, Tensor bias, Tensor bases, int steps, Tensor ham_out, Tensor norm_weight,"
    " Tensor norm_bias, int groups, float eps, bool round_factors) -> Tensor",
    hamburger,
)
