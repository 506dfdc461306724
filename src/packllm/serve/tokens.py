"""POST /tokenize and /detokenize with the first member's tokenizer, in vLLM's format."""

from __future__ import annotations

from typing import Any

from packllm.chat.formatted import Tokens
from packllm.chat.messages import check
from packllm.errors import PromptError
from packllm.serve.metrics import Call
from packllm.serve.models import Served
from packllm.serve.protocol import Detokenize, Tokenize
from packllm.serve.reply import Events


def tokenize(served: Served, body: Tokenize, _: Call) -> Events:
    """The ids of a text or a conversation.

    Raises:
        PromptError: not exactly one of prompt and messages is given.
    """
    if (body.prompt is None) == (body.messages is None):
        raise PromptError("give either prompt or messages")
    said = {"tools": body.tools, "chat_template_kwargs": body.chat_template_kwargs}
    checked = served.pack.check(**body.options(), **{name: value for name, value in said.items() if value is not None})
    encoder = served.pack.members[0].encoder
    if body.messages is not None:
        messages = check(body.messages, chat_template=True)
        ids = encoder.encode(messages, None, checked.tools, None, checked.chat_template_kwargs).ids
    elif not body.prompt or not body.add_special_tokens:
        ids = encoder.plain(body.prompt or "")
    else:
        ids = encoder.encode(check(body.prompt, chat_template=False)).ids
    result: dict[str, Any] = {"count": len(ids), "max_model_len": served.pack.context_window, "tokens": ids}
    if body.return_token_strs:
        result["token_strs"] = [encoder.vocabulary.tokens[i].decode(errors="replace") for i in ids]
    yield result


def detokenize(served: Served, body: Detokenize, _: Call) -> Events:
    """The text of token ids, without control tokens."""
    vocabulary = served.pack.members[0].vocabulary
    silent = all(0 <= i < len(vocabulary) and not vocabulary.text_bytes(i) for i in body.tokens)
    yield {"prompt": "" if silent else str.__str__(Tokens.of(body.tokens, vocabulary))}


def info(served: Served) -> dict[str, Any]:
    """Facts about the tokenizer for clients that count tokens."""
    member = served.pack.members[0]
    vocabulary = member.vocabulary

    def spelled(role: str) -> str | None:
        i = vocabulary.special.get(role)
        return None if i is None else vocabulary.tokens[i].decode(errors="replace")

    roles = {f"{role}_token": spelled(role) for role in ("bos", "eos", "pad", "unk")}
    return {**roles, "chat_template": member.encoder.template, "vocab_size": len(vocabulary)}
