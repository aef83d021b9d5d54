"""Chooses the forward pass: the fastest that does this model on this device."""

from __future__ import annotations

from torch import nn

from flowkv_common.engine.attention import Attention
from flowkv_common.engine.attention_torch import TorchAttention
from flowkv_common.engine.flat import FlatForward
from flowkv_common.engine.flat_weights import flat_weights
from flowkv_common.engine.modules import Forward, ModulesForward


def make_forward(module: nn.Module, attention: Attention) -> Forward:
    """`attention` must come with every call."""
    weights = flat_weights(module)
    if weights is None:
        return ModulesForward(module)
    if isinstance(attention, TorchAttention) and type(attention) is not TorchAttention:
        from flowkv_common.engine.attention_cpu import CpuAttention
        from flowkv_common.engine.flat_cpu import CpuFlatForward

        if isinstance(attention, CpuAttention) and CpuFlatForward.fits(weights):
            return CpuFlatForward(weights, attention)
    return FlatForward(weights)
