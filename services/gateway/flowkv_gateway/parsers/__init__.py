"""Tool calls and reasoning in a model's text: a parser per format, found by the model's chat template.

    make = parser_for(template, name)
    parser = make(tools, prompt, streams_calls=True)
    events = parser.push(text)  # for each piece of the answer, special tokens included
    events += parser.finish()

To add a format, write a `Parser` in a file of its own and put it into `FORMATS`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from flowkv_gateway.parsers.deepseek import DeepSeek
from flowkv_gateway.parsers.events import Arguments, CallBegins, Content, Event, Leftover, Reasoning
from flowkv_gateway.parsers.gemma import FunctionGemma, Gemma
from flowkv_gateway.parsers.glm import Glm
from flowkv_gateway.parsers.harmony import Harmony
from flowkv_gateway.parsers.hermes import Hermes
from flowkv_gateway.parsers.invoke import Dsml, MiniMax
from flowkv_gateway.parsers.kimi import Kimi
from flowkv_gateway.parsers.kimi_k3 import KimiK3
from flowkv_gateway.parsers.llama import Llama
from flowkv_gateway.parsers.mistral import Mistral
from flowkv_gateway.parsers.qwen_coder import QwenCoder
from flowkv_gateway.parsers.reading import Parser
from flowkv_gateway.parsers.thinking import Thinking

__all__ = [
    "FORMATS",
    "Arguments",
    "CallBegins",
    "Content",
    "Event",
    "Leftover",
    "Parser",
    "Reasoning",
    "can_reason",
    "parser_for",
]


class Format(NamedTuple):
    """`in_template`: text that templates of these models have in them, and those of the formats below don't.

    `names` are what vLLM calls the format, as far as it has it.
    """

    parser: type[Parser]
    in_template: str
    names: tuple[str, ...]


# A template may have marks of a simpler format in it, too, so the first that is found counts.
FORMATS = (
    Format(Harmony, "<|channel|>", ("openai", "gpt_oss", "harmony")),
    Format(KimiK3, "<|open|>", ("kimi_k3",)),
    Format(Kimi, "<|tool_calls_section_begin|>", ("kimi_k2",)),
    Format(Dsml, "｜DSML｜", ("deepseek_v32", "deepseek_v4", "deepseek_v41")),
    Format(DeepSeek, "<｜tool▁calls▁begin｜>", ("deepseek_v3", "deepseek_v31")),
    Format(MiniMax, "<minimax:tool_call>", ("minimax_m2",)),
    Format(Mistral, "[TOOL_CALLS]", ("mistral",)),
    Format(Gemma, "<|tool_call>", ("gemma4",)),
    Format(FunctionGemma, "<start_function_call>", ("functiongemma",)),
    Format(Glm, "<arg_key>", ("glm45", "glm47")),
    Format(QwenCoder, "<function=", ("qwen3_coder", "qwen3_xml")),
    Format(Hermes, "<tool_call>", ("hermes",)),
    Format(Llama, "<|python_", ("llama3_json", "llama4_pythonic", "llama4_json", "pythonic")),
    Format(Llama, '{"name": function name, "parameters"', ()),
    Format(Thinking, "</think>", ("deepseek_r1",)),
)


# Every format's beginning or end of reasoning.
_REASONING = re.compile(r"think>|\[THINK\]|<\|channel|<\|open\|>think")


def can_reason(template: str) -> bool:
    """Whether answers may begin with reasoning, as far as this chat template tells."""
    return _REASONING.search(template) is not None


def parser_for(template: str, name: str | None = None) -> type[Parser] | None:
    """The parser of the format with this name, else of the one in this chat template; None if there is none.

    Raises ValueError if no format has this name.
    """
    if name is None:
        return next((format.parser for format in FORMATS if format.in_template in template), None)
    for format in FORMATS:
        if name in format.names:
            return format.parser
    names = ", ".join(sorted(name for format in FORMATS for name in format.names))
    raise ValueError(f"there is no tool parser {name!r}; there are {names}")
