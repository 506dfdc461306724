"""From text or messages to each member's token ids, and which of them are scored."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from packllm.align.vocabulary import Vocabulary, tokenizer_json
from packllm.errors import PromptError

ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, Any]
Prompt = str | Sequence[Message]

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""How messages are put to a member without a chat template: one line a message, "User: ..."."""


@dataclass(frozen=True)
class Encoded:
    """A prompt in one member's tokens.

    Attributes:
        ids: token ids, with what the tokenizer or template puts before and around the text.
        text: the scored text: the user's words as given, or the part of them that score_on names. The same
            for every member, whatever its template trims.
        positions: indices into ids of the tokens of that text that have a token before them.
        starts, ends: character offsets of those tokens in `text`.
    """

    ids: list[int]
    text: str
    positions: list[int]
    starts: list[int]
    ends: list[int]


@dataclass(frozen=True)
class _Span:
    """Text to score, and where a prompt shows it: prompt[start:stop] is text[lead : lead + stop - start]."""

    start: int
    stop: int
    text: str
    lead: int = 0

    def parts(self, part: str) -> list[_Span]:
        """The spans of each occurrence of `part` in the text."""
        return [self._cut(match.start(), match.end()) for match in re.finditer(re.escape(part), self.text)]

    def _cut(self, begin: int, end: int) -> _Span:
        zero = self.start - self.lead  # where the text would begin, were all of it shown
        start, stop = (min(max(zero + at, self.start), self.stop) for at in (begin, end))
        return _Span(start, stop, self.text[begin:end], start - zero - begin)


def check(prompt: Prompt, chat_template: bool) -> Prompt:
    """The prompt as encode() takes it: text, or messages with text contents.

    Raises:
        PromptError: empty, an unknown role, content that is not text, text that is not Unicode.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("prompt is empty; give at least one character")
        _check_unicode(prompt)
        return [{"role": "user", "content": prompt}] if chat_template else prompt
    if not isinstance(prompt, Sequence) or not prompt:
        raise PromptError(f"prompt must be text or a non-empty list of messages, not {prompt!r}")
    messages: Sequence[Any] = prompt
    return [_check_message(message, at) for at, message in enumerate(messages)]


def _check_message(message: Any, at: int) -> Message:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise PromptError(f"message {at} must be a mapping with 'role' and 'content', not {message!r}")
    if message["role"] not in ROLES:
        raise PromptError(f"message {at} has role {message['role']!r}; valid roles: {', '.join(ROLES)}")
    content = message["content"]
    if content is None:
        content = ""
    elif isinstance(content, Sequence) and not isinstance(content, str | bytes | bytearray):
        content = "".join(_text_part(part, at) for part in content)
    elif not isinstance(content, str):
        kind = type(content).__name__
        raise PromptError(f"message {at} has content of type {kind!r}; give text or a list of text parts")
    _check_unicode(content)
    return {**message, "content": content}


def _text_part(part: Any, at: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise PromptError(f"message {at} holds content of type {kind!r}; the members read text only")


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"prompt holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which is not "
            f"Unicode text; decode its source with errors='replace'"
        ) from None


class Encoder:
    """One tokenizer's way from prompts to ids, safe for text that nobody vouches for.

    Control tokens are renamed, in a copy of the tokenizer, to names that cannot be guessed. Only what the
    chat template itself writes is given those names, so a control token spelled inside a message is
    encoded as the plain text it is, and everything else exactly as the tokenizer would.

    Raises:
        VocabularyError: the tokenizer has no `tokenizers` backend.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.template: str | None = _template_text(tokenizer)
        data = tokenizer_json(tokenizer)
        self.vocabulary = Vocabulary.from_json(data, tokenizer)
        self._nonce = f"{secrets.randbits(64):020d}"  # digits: no template or normaliser changes their case
        self._alias = self._rename(data)
        self._backend = Tokenizer.from_str(json.dumps(data))
        self._backend.no_padding()
        self._backend.no_truncation()
        self._real_id = {
            self._backend.token_to_id(self._alias[token["content"]]): token["id"] for token in self._control
        }
        self._find_control = re.compile(
            "|".join(re.escape(content) for content in sorted(self._alias, key=len, reverse=True)) or r"(?!)"
        )

    def _rename(self, data: dict[str, Any]) -> dict[str, str]:
        template = self.template or ""
        # Some tokenizers add runs of spaces or newlines as tokens: a template uses them, but they are text.
        self._control = [
            dict(t) for t in data["added_tokens"] if t["special"] or (t["content"].strip() and t["content"] in template)
        ]
        alias = {t["content"]: f"\ue000{self._nonce}{i:x}\ue001" for i, t in enumerate(self._control)}
        for token in data["added_tokens"]:
            token["content"] = alias.get(token["content"], token["content"])
        model = data["model"]
        if isinstance(model["vocab"], dict):
            if "merges" in model and alias.keys() & model["vocab"].keys():
                model["merges"] = [pair for pair in model["merges"] if not _merge_pieces(pair) & alias.keys()]
            model["vocab"] = {alias.get(piece, piece): i for piece, i in model["vocab"].items()}
        else:
            model["vocab"] = [[alias.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in alias:
            model["unk_token"] = alias[model["unk_token"]]
        data["post_processor"] = None  # it adds BOS and the like, which _prefix does, and trims offsets
        return alias

    @cached_property
    def _prefix(self) -> list[int]:
        """What the tokenizer puts before a text: BOS, or nothing."""
        bare = self._tokenizer("a", add_special_tokens=False).input_ids
        full = self._tokenizer("a").input_ids
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        return full[:at]

    @cached_property
    def end_of_turn(self) -> int | None:
        """The control token that the chat template writes after an assistant's answer."""
        if self.template is None:
            return None
        mark = self._mark(0)
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
        try:
            rendered = self._tokenizer.apply_chat_template(turn, tokenize=False)
        except Exception:  # a template that refuses this dialogue tells nothing
            return None
        after = self._find_control.match(rendered.partition(mark)[2].lstrip())
        return self._real_id_of(after[0]) if after else None

    def _real_id_of(self, content: str) -> int:
        return next(token["id"] for token in self._control if token["content"] == content)

    def encode(self, prompt: Prompt, score_on: str | None = None) -> Encoded:
        """Token ids of a checked prompt.

        Text is encoded as the tokenizer does, BOS included where it adds one. Messages go through the chat
        template, with the mark that an answer follows.

        Raises:
            PromptError: the template refuses the messages or leaves nothing of them, or score_on does not
                occur in the user's text.
        """
        if isinstance(prompt, str):
            prefix, text, spans = self._prefix, prompt, [_Span(0, len(prompt), prompt)]
        else:
            prefix = [] if self.template else self._prefix  # a chat template writes its own BOS
            text, spans = self._render(prompt)
            _check_unicode(text)
        if score_on is not None:
            spans = [part for span in spans for part in span.parts(score_on)]
            if not spans:
                raise PromptError(f"score_on={score_on!r} does not occur in the user's text of the prompt")
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids = [*prefix, *(self._real_id.get(i, i) for i in encoding.ids)]
        if not ids:
            raise PromptError("prompt comes to no tokens: the chat template or the tokenizer leaves nothing of it")
        positions, starts, ends = [], [], []
        shift = 0  # from offsets in `text` to offsets in the scored text
        for span in spans:
            moved = span.lead - span.start + shift
            for at, (start, stop) in enumerate(encoding.offsets, len(prefix)):
                if at > 0 and span.start <= start < stop <= span.stop:
                    positions.append(at)
                    starts.append(start + moved)
                    ends.append(stop + moved)
            shift += len(span.text)
        return Encoded(ids, "".join(span.text for span in spans), positions, starts, ends)

    def plain(self, text: str) -> list[int]:
        """Ids of `text` alone: no BOS, no control tokens."""
        return [self._real_id.get(i, i) for i in self._backend.encode(text, add_special_tokens=False).ids]

    def continuation(self, text: str) -> list[int]:
        """Ids of `text` as it continues a prompt whose own ids stay as they are: without BOS, and without
        the space that some tokenizers put before a text."""
        for anchor in ("\n", ".", "a"):
            before, both = self.plain(anchor), self.plain(anchor + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self.plain(text)

    def _render(self, messages: Sequence[Message]) -> tuple[str, list[_Span]]:
        """The rendered template with control tokens renamed, and the spans of the user's contents in it."""
        spelled: list[str] = []
        messages = [self._guard(message, spelled) for message in messages]
        marks = [self._mark(i) for i in range(len(messages))]
        rendered, contents = self._shown(messages, marks)
        text = {**dict(zip(marks, contents, strict=True)), **{self._spelled(i): s for i, s in enumerate(spelled)}}
        pieces = []
        shown: dict[str, int] = {}
        at = 0
        for piece in re.split(f"(\ue000{self._nonce}[\ue002\ue003][0-9]+\ue001)", rendered):
            if piece in text:
                shown.setdefault(piece, at)
                piece = text[piece]
            else:
                piece = self._find_control.sub(lambda found: self._alias[found[0]], piece)
            pieces.append(piece)
            at += len(piece)
        spans = []
        reached = 0
        for mark, content, message in zip(marks, contents, messages, strict=True):
            if message["role"] == "user":
                start, lead = shown.get(mark, -1), message["content"].find(content)
                if start < reached or lead < 0:  # left out, moved or rewritten: nothing of it is scored
                    spans.append(_Span(reached, reached, message["content"]))
                    continue
                reached = start + len(content)
                spans.append(_Span(start, reached, message["content"], lead))
        return "".join(pieces), spans

    def _guard(self, message: Message, spelled: list[str]) -> Message:
        """The message with marks for the control tokens spelled in it outside its content (in a name or a
        tool call, say); they are appended to `spelled`."""

        def mark(found: re.Match[str]) -> str:
            spelled.append(found[0])
            return self._spelled(len(spelled) - 1)

        def guarded(value: Any) -> Any:
            if isinstance(value, str):
                return self._find_control.sub(mark, value)
            if isinstance(value, Mapping):
                return {guarded(key): guarded(inner) for key, inner in value.items()}
            return [guarded(inner) for inner in value] if isinstance(value, list | tuple) else value

        return {key: value if key in ("role", "content") else guarded(value) for key, value in message.items()}

    def _mark(self, index: int) -> str:
        """Stands for a message's content while the template is rendered."""
        return f"\ue000{self._nonce}\ue002{index}\ue001"

    def _spelled(self, index: int) -> str:
        """Stands for a control token spelled in another field."""
        return f"\ue000{self._nonce}\ue003{index}\ue001"

    def _shown(self, messages: Sequence[Message], marks: Sequence[str]) -> tuple[str, list[str]]:
        """The rendered template with a mark for each content, and the contents as it shows them: most
        templates leave them alone, some trim them or drop a part."""
        marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
        rendered = self._apply(marked)
        contents = [message["content"] for message in messages]
        if self._fill(rendered, marks, contents) == self._apply(messages):
            return rendered, contents
        for i, mark in enumerate(marks):
            alone = self._apply([*marked[:i], messages[i], *marked[i + 1 :]])
            before, found, after = rendered.partition(mark)
            shown = len(alone) - len(before) - len(after)
            if found and mark not in after and shown >= 0 and alone.startswith(before) and alone.endswith(after):
                contents[i] = alone[len(before) : len(before) + shown]
        return rendered, contents

    @staticmethod
    def _fill(rendered: str, marks: Sequence[str], contents: Sequence[str]) -> str:
        for mark, content in zip(marks, contents, strict=True):
            rendered = rendered.replace(mark, content)
        return rendered

    def _apply(self, messages: Sequence[Message]) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
                chat_template=None if self.template else PLAIN_TEMPLATE,
            )
        except Exception as error:  # jinja raises what the template's author chose
            roles = ", ".join(str(message["role"]) for message in messages)
            raise PromptError(f"the chat template refuses messages with roles [{roles}]: {error}") from error


def _template_text(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):  # several named templates
        template = template.get("default") or "".join(template.values())
    return template or None


def _merge_pieces(pair: str | Sequence[str]) -> set[str]:
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return {left, right, left + right}
