"""Chooses the forward pass: the fastest that does this model on this device."""

from __future__ import annotations

from torch import nn

from flowkv_common.engine.attention import Attention
from flowkv_common.engine.backends import CPU, TRITON
from flowkv_common.engine.flat import FlatForward
from flowkv_common.engine.flat_weights import flat_weights
from flowkv_common.engine.modules import Forward, ModulesForward


def make_forward(module: nn.Module, attention_name: str, attention: Attention) -> Forward:
    """`attention`, a backend of that name, must come with every call."""
    weights = flat_weights(module)
    if weights is None:
        return ModulesForward(module)
    if attention_name == TRITON:
        from flowkv_common.engine.attention_triton import TritonAttention
        from flowkv_common.engine.flat_triton import TritonFlatForward

        assert isinstance(attention, TritonAttention)
        return TritonFlatForward(weights, attention)
    if attention_name == CPU:
        from flowkv_common.engine.attention_cpu import CpuAttention
        from flowkv_common.engine.flat_cpu import CpuFlatForward

        if isinstance(attention, CpuAttention) and CpuFlatForward.fits(weights):
            return CpuFlatForward(weights, attention)
    return FlatForward(weights)
