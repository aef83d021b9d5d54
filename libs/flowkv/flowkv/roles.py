"""Every node hosts both roles: prefill and decode are named here, and nowhere else."""

from __future__ import annotations

from flowkv_decode.sequences import DecodeRole
from flowkv_node.node import Roles
from flowkv_prefill.prompts import PrefillRole

ROLES = Roles(prefill=PrefillRole, decode=DecodeRole)
