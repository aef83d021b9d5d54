"""How well the nodes kept their pace while a benchmark ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.paced.engine import Kept

# Beyond this the nodes were not what they are said to be: the host was too slow for so many.
MAX_SLIP = 0.05


@dataclass(frozen=True)
class Pace:
    """Over all nodes of a run. `slip`: by which share of the stated time steps were longer."""

    num_steps: int
    slip: float
    worst_node_slip: float

    @property
    def is_kept(self) -> bool:
        return self.slip <= MAX_SLIP

    def __str__(self) -> str:
        return f"{self.slip:+.1%}" + ("" if self.is_kept else " NOT KEPT")


def pace_of(kept: Mapping[str, Kept]) -> Pace:
    """Of the nodes that have run steps."""
    each = [node for node in kept.values() if node.num_steps]
    total = Kept(
        *(sum(getattr(node, name) for node in each) for name in ("num_steps", "stated_s", "taken_s"))
    )
    worst = max((node.slip for node in each), default=0.0)
    return Pace(total.num_steps, round(total.slip, 4), round(worst, 4))
