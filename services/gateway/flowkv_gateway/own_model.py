"""Which model is this gateway's: several may be on one NATS, and another one's tokens would be nonsense here.

The gateway has a model folder, often without the weights, and nodes say in their card what they serve.
"""

from __future__ import annotations

import msgspec

from flowkv_common.wire.parts import ModelCard, ModelFiles


class OwnModel(msgspec.Struct, frozen=True):
    """The files in the gateway's folder, and the name that clients shall use: empty if the nodes' name."""

    files: ModelFiles
    name: str = ""

    def why_not(self, card: ModelCard) -> str | None:
        """Why nodes with this card serve another model; None if they serve ours.

        The tokenizer must be the same. Then the weights decide, where both sides have them. Else the rest of
        what is known must agree: config and name.
        """
        if _differ(self.files.tokenizer, card.files.tokenizer):
            return "its tokenizer.json is another"
        if self.files.weights and card.files.weights:
            return "its weights are others" if self.files.weights != card.files.weights else None
        if _differ(self.files.config, card.files.config):
            return "its config.json is another"
        if self.name and self.name != card.name:
            return f"it is not called {self.name!r}, and there are no weights here to compare"
        return None


def _differ(ours: str, theirs: str) -> bool:
    """Of two digests, of which either may be unknown."""
    return bool(ours and theirs) and ours != theirs
