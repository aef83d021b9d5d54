"""Every node hosts both roles: prefill and decode are named here, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping

from flowkv_decode.sequences import DecodeGuest
from flowkv_node.node import GuestFactory
from flowkv_prefill.prompts import PrefillGuest

ROLES: Mapping[str, GuestFactory] = {"prefill": PrefillGuest, "decode": DecodeGuest}
