"""How the model's makers want its tokens chosen, where a request does not say."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from flowkv_common.errors import CannotStart
from flowkv_gateway.params import RepetitionPenalty, Share, Temperature, TopK

log = logging.getLogger(__name__)

_FILE = "generation_config.json"


class SamplingDefaults(msgspec.Struct, frozen=True):
    """Of generation_config.json, what requests can set as well. None: the file does not say.

    `do_sample` is not heeded, nor is it by vLLM: whoever asks for a temperature of 0 gets the best token.
    """

    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    repetition_penalty: RepetitionPenalty | None = None


def load_sampling_defaults(folder: Path, generation_config: str) -> SamplingDefaults:
    """Those of the model in `folder`, and a line in the log; none if `generation_config` is "none".

    Raises CannotStart for a file that can't be used.
    """
    file = folder / _FILE
    if generation_config == "none" or not file.exists():
        return SamplingDefaults()
    try:
        defaults = msgspec.json.decode(file.read_bytes(), type=SamplingDefaults, strict=False)
    except msgspec.DecodeError as error:
        raise CannotStart(f"{file}: {error}; FLOWKV_GENERATION_CONFIG=none leaves it out") from None
    given = {name: value for name, value in msgspec.structs.asdict(defaults).items() if value is not None}
    if given:
        log.info("where a request is silent, %s applies: %s", _FILE, given)
    return defaults
