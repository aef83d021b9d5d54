"""The models that a gateway serves: of its own folders, and of nodes whose folders it can read."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from flowkv_common.aio import wait_event
from flowkv_common.config import GatewaySettings, listed
from flowkv_common.errors import BadRequest, CannotStart
from flowkv_common.fingerprint import model_files
from flowkv_common.wire.messages import ModelCard
from flowkv_common.wire.nodes import NodeDescriptor
from flowkv_gateway.chat import ChatFormat
from flowkv_gateway.cluster import Cluster, ModelNodes, OwnModel
from flowkv_gateway.errors import ModelNotFound
from flowkv_gateway.grammar import GrammarChecker
from flowkv_gateway.prompts import SamplingDefaults, load_sampling_defaults
from flowkv_gateway.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# A model that was found by its nodes is forgotten so long after the last of them has gone.
FORGET_AFTER_S = 60.0


@dataclass(frozen=True, eq=False)
class Model:
    """All that requests for one model need. `set_names` are the operator's; the first is that of answers."""

    tokenizer: Tokenizer
    format: ChatFormat
    defaults: SamplingDefaults
    checker: GrammarChecker
    nodes: ModelNodes
    folder_names: Sequence[str]
    set_names: Sequence[str] = ("",)
    parser_name: str = ""  # FLOWKV_TOOL_PARSER

    @classmethod
    def load(cls, folder: Path, settings: GatewaySettings, *, is_first: bool = False) -> Model:
        """From the files in `folder`. Names and the tool parser that are set are those of the first model.

        Raises CannotStart for files that can't be used, or a tool parser that there is not.
        """
        trusts_typed = settings.trust_typed_special_tokens
        tokenizer = Tokenizer.load(folder, trusts_typed_special_tokens=trusts_typed)
        names = [settings.model_name] if is_first else [""]
        parser_name = settings.tool_parser if is_first else ""
        return cls(
            tokenizer=tokenizer,
            format=ChatFormat(tokenizer, parser_name),
            defaults=load_sampling_defaults(folder, settings.generation_config),
            checker=GrammarChecker(tokenizer.file),
            nodes=ModelNodes(OwnModel(model_files(folder), names[0])),
            folder_names=(folder.name, folder.resolve().name),
            set_names=(listed(settings.model_names) if is_first else []) or names,
            parser_name=parser_name,
        )

    @property
    def known_name(self) -> str | None:
        """As it was set, else as the nodes call it; None before any has joined."""
        card = self.nodes.model
        return self.set_names[0] or (card.name if card else None)

    @property
    def name(self) -> str:
        return self.known_name or self.folder_names[0]

    @property
    def names(self) -> list[str]:
        """All by which clients find it in the list of models, the one that answers have first."""
        return [self.name, *self.set_names[1:]]


class Models:
    """Finds the model of a request, and the models of nodes. An async context manager."""

    def __init__(self, models: Sequence[Model]) -> None:
        """`models` are always served, others while there are nodes of them."""
        self._own = list(models)
        self._found: list[Model] = []
        self._served_at: dict[Model, float] = {}  # when one that was found had nodes last
        self._refused: set[tuple[str, str]] = set()  # fingerprint and folder, of nodes that can't be served

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for model in self.all:
            await model.checker.close()

    @property
    def all(self) -> list[Model]:
        return [*self._own, *self._found]

    def by_name(self) -> Mapping[str, Model]:
        """Each name that is listed, with the model that has it."""
        return {name: self.find(name) for model in self.all for name in model.names}

    def find(self, name: str | None) -> Model:
        """The model of a request: the only one if it names none. Raises ModelNotFound, and BadRequest.

        The name of a folder means its model, too, whatever the nodes call it. Two models of one name are one
        that is being exchanged: the first with a ready node has it.
        """
        models = self.all
        if name is None:
            fitting = models
            if len(names := sorted({model.name for model in models})) > 1:
                raise BadRequest(
                    f"Several models are served here, say which: {', '.join(names)}.", field="model"
                )
        else:
            fitting = [model for model in models if name in model.names]
            fitting = fitting or [model for model in models if name in model.folder_names]
        if not fitting:
            raise ModelNotFound(f"The model {name!r} does not exist.", field="model")
        return max(fitting, key=lambda model: model.nodes.has_ready_node())

    async def follow(self, cluster: Cluster, settings: GatewaySettings) -> None:
        """Until cancelled: serve the models of other nodes, too, as long as there are such nodes."""
        while True:
            cluster.changed.clear()
            await self._forget_gone(cluster)
            others = _models_of(cluster.others.values())
            self._refused &= others.keys()
            why_not: dict[tuple[str, str], str] = {}
            for which, (card, why_not_own) in others.items():
                # A model has several folders where its nodes are on several hosts: one is enough.
                if which in self._refused or which not in _models_of(cluster.others.values()):
                    continue
                try:
                    # Large tokenizers take a second of a core.
                    model = await asyncio.to_thread(_load_as_described, card, settings)
                except Exception as error:  # whatever nodes name costs only their model
                    self._refused.add(which)
                    why_not[which] = f"{error}. Nor is it of the gateway's own folders: {why_not_own}"
                else:
                    log.info("%s of nodes is served, too, from %s", card.name, card.folder)
                    self._found.append(model)
                    self._served_at[model] = time.monotonic()
                    cluster.add(model.nodes)
            for which in why_not.keys() & _models_of(cluster.others.values()).keys():
                log.warning("%s of nodes is not served here: %s", others[which][0].name, why_not[which])
            await wait_event(cluster.changed, FORGET_AFTER_S / 4)

    async def _forget_gone(self, cluster: Cluster) -> None:
        now = time.monotonic()
        self._served_at |= {model: now for model in self._found if model.nodes.has_nodes}
        for model in list(self._found):
            if now - self._served_at[model] > FORGET_AFTER_S:
                log.info("%s has no nodes any more", model.name)
                self._found.remove(model)
                del self._served_at[model]
                cluster.remove(model.nodes)
                await model.checker.close()


def _models_of(others: Iterable[tuple[NodeDescriptor, str]]) -> dict[tuple[str, str], tuple[ModelCard, str]]:
    """By fingerprint and folder: what nodes serve, and why it is none of the gateway's own."""
    return {(node.model.fingerprint, node.model.folder): (node.model, why_not) for node, why_not in others}


def _load_as_described(card: ModelCard, settings: GatewaySettings) -> Model:
    """The model in the folder that its nodes have it in. Raises CannotStart if that holds another one."""
    folder = Path(card.folder)
    mend = "give this gateway a folder with its tokenizer in FLOWKV_MODEL_PATH, behind a comma"
    if not folder.is_absolute() or not folder.is_dir():
        raise CannotStart(f"its folder, {card.folder or 'which they do not tell'}, is not here: {mend}")
    try:
        model = Model.load(folder, settings)
    except OSError as error:
        raise CannotStart(f"{folder} can't be read, {error.strerror}: {mend}") from error
    if why_not := model.nodes.own.why_not(card):
        raise CannotStart(f"{folder} holds another model here, {why_not}: {mend}")
    return model
