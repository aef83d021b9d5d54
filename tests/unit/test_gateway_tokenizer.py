"""Encoding and chat templates give what `transformers` gives for the same folder."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flowkv_common.errors import BadRequest
from flowkv_gateway.tokenizer import ChatTemplate, Conversation, Tokenizer
from tests.gateway_support import TEMPLATE, write_tokenizer

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "h\u00e9llo <b> \U0001f600\n"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": "\u00e9"}}}],
    },
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        chat_template=TEMPLATE,
        eos_token="<|end|>",
        bos_token="<|start|>",
    )


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
async def test_chat_is_that_of_transformers(
    folder: Path, reference: Any, tools: list[dict[str, Any]] | None, add_generation_prompt: bool
) -> None:
    ours = await Tokenizer.load(folder).encode_chat(
        Conversation(CHAT, tools, add_generation_prompt=add_generation_prompt)
    )
    theirs = reference.apply_chat_template(
        CHAT, tools=tools, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    assert ours.token_ids == theirs


async def test_long_texts_are_encoded_like_short_ones_but_off_the_loop(folder: Path, reference: Any) -> None:
    tokenizer = Tokenizer.load(folder)
    text = "the quick brown fox \u00e9 " * 20_000
    encoding = asyncio.ensure_future(tokenizer.encode([text, "fox"]))
    await asyncio.sleep(0)  # one turn: all that runs on the loop itself has now been done
    assert not encoding.done()
    assert await encoding == [reference.encode(text), reference.encode("fox")]


async def test_decode_shows_special_tokens(folder: Path, reference: Any) -> None:
    token_ids = [0, 1, 200, 300, 9999]
    assert await Tokenizer.load(folder).decode(token_ids) == reference.decode(token_ids[:-1])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].missing.deeper }}",
        "{{ ''.__class__.__mro__ }}",  # the sandbox
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{{ messages[0]['content'] + 1 }}",
    ],
)
def test_whatever_a_template_raises_is_a_bad_request(source: str) -> None:
    with pytest.raises(BadRequest) as caught:
        ChatTemplate(source, {}).render(Conversation(CHAT))
    assert caught.value.field == "messages"


def render(source: str, messages: list[dict[str, Any]], **fields: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(Conversation(messages, **fields))


def test_a_request_may_set_what_its_template_reads() -> None:
    source = (
        "{{ bos_token }}{% if think is defined and not think %}quick {% endif %}{{ messages[0].content }}"
    )
    assert render(source, CHAT) == "<s>be brief"
    assert render(source, CHAT, template_kwargs={"think": False}) == "<s>quick be brief"
    assert render(TEMPLATE, CHAT, template_kwargs={"add_generation_prompt": True}) == render(TEMPLATE, CHAT)
    own: dict[str, Any] = {"messages": [], "tools": "x", "documents": [], "add_generation_prompt": False}
    for name, value in own.items():
        with pytest.raises(BadRequest, match=f"`{name}`") as caught:
            render(TEMPLATE, CHAT, template_kwargs={name: value})
        assert caught.value.field == f"chat_template_kwargs.{name}"


def test_documents_are_refused_by_a_template_without_a_place_for_them() -> None:
    documents = [{"title": "a", "text": "b"}]
    source = "{% for document in documents or [] %}{{ document.text }} {% endfor %}{{ messages[0].content }}"
    assert render(source, CHAT, documents=documents) == "b be brief"
    with pytest.raises(BadRequest) as caught:
        render(TEMPLATE, CHAT, documents=documents)
    assert caught.value.field == "documents"
    assert render(TEMPLATE, CHAT, documents=[]) == render(TEMPLATE, CHAT)


@pytest.mark.parametrize(
    "content",
    [
        *("The capital is", " The capital is ", "be brief", "<|end|> is a token"),
        *("<", "|", "end", ">", " end "),  # these occur again in what ends the turn
    ],
)
@pytest.mark.parametrize("trims", [False, True])
async def test_the_last_message_is_continued_as_transformers_does(
    folder: Path, tmp_path: Path, content: str, trims: bool
) -> None:
    from transformers import PreTrainedTokenizerFast

    source = (
        TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] | trim }}") if trims else TEMPLATE
    )
    chat = [*CHAT[:2], {"role": "assistant", "content": content}]
    text = ChatTemplate(source, {}).render(Conversation(chat, continue_final_message=True))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), chat_template=source)
    assert text == theirs.apply_chat_template(chat, continue_final_message=True, tokenize=False)
    assert text.endswith(content.strip() if trims else content)


def test_what_can_not_be_continued_is_refused() -> None:
    for source, content in ((TEMPLATE, " "), (TEMPLATE, ""), ("{{ messages | length }}", "hi")):
        with pytest.raises(BadRequest) as caught:
            render(source, [{"role": "user", "content": content}], continue_final_message=True)
        assert caught.value.field == "continue_final_message"


def test_template_language() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% break %}{% endfor %}\n"
        "  {% set _ = 1 %}\n{{ strftime_now('%%') }}{{ bos_token }}{{ {'a': '<é>'} | tojson }}",
        {"bos_token": "<s>"},
    )
    assert template.render(Conversation(CHAT)) == 'system%<s>{"a": "<é>"}'


def test_a_template_gives_options_of_json_in_the_order_of_transformers() -> None:
    source = "{{ {'b': 1, 'a': 'é'} | tojson(true, none, (',', ':'), true) }}"
    assert ChatTemplate(source, {}).render(Conversation([])) == '{"a":"\\u00e9","b":1}'


async def test_named_and_missing_templates(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(BadRequest):
        await Tokenizer.load(tmp_path).encode_chat(Conversation(CHAT))
    (tmp_path / "chat_template.json").write_text('{"chat_template": "<|start|>"}')  # of a processor
    assert await Tokenizer.load(tmp_path).encode_chat(Conversation(CHAT)) == ("<|start|>", [1])
    config = (
        '{"bos_token": {"content": "<|start|>"}, "chat_template": [{"name": "default", "template": "%s"}]}'
    )
    (tmp_path / "tokenizer_config.json").write_text(config % "{{ bos_token }}")
    assert await Tokenizer.load(tmp_path).encode_chat(Conversation(CHAT)) == ("<|start|>", [1])
    tool_use = tmp_path / "additional_chat_templates" / "tool_use.jinja"
    tool_use.parent.mkdir()
    tool_use.write_text("{{ tools }}")
    tokenizer = await asyncio.to_thread(Tokenizer.load, tmp_path)
    assert (await tokenizer.encode_chat(Conversation(CHAT))).text == "<|start|>"
    assert (await tokenizer.encode_chat(Conversation(CHAT, [{}]))).text == "[{}]"
    assert tokenizer.template_takes_tools


def test_neither_torch_nor_transformers_is_loaded() -> None:
    script = "import sys, flowkv_gateway.app; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
