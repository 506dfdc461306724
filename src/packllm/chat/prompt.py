"""From text or messages to each member's token ids, and which of them are scored."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from tokenizers import Tokenizer

from packllm.align.vocabulary import Vocabulary, tokenizer_json
from packllm.chat import convention
from packllm.chat.messages import ROLES, Message, Prompt, check, check_unicode
from packllm.errors import PromptError

__all__ = ["PLAIN_TEMPLATE", "ROLES", "Encoded", "Encoder", "Message", "Prompt", "check"]

Layout = Callable[[Sequence[Message]], str]

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
        if self.end_of_turn is not None:
            self.vocabulary = self.vocabulary.with_role("end_of_turn", self.end_of_turn)

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

    def encode(
        self,
        prompt: Prompt,
        score_on: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        json_schema: Mapping[str, Any] | None = None,
    ) -> Encoded:
        """Token ids of a checked prompt.

        Text is encoded as the tokenizer does, BOS included where it adds one. Messages go through the chat
        template, with the mark that an answer follows; so do tools, where the template has a place for them. What
        it has no place for or refuses is told in words (see convention.py), a JSON schema always.

        Raises:
            PromptError: the template refuses the messages or leaves nothing of them, or score_on does not
                occur in the user's text.
        """
        if isinstance(prompt, str):
            prefix, text, spans = self._prefix, prompt, [_Span(0, len(prompt), prompt)]
        else:
            prefix = [] if self.template else self._prefix  # a chat template writes its own BOS
            text, spans = self._render(prompt, tools, json_schema)
            check_unicode(text)
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

    @cached_property
    def has_words(self) -> bool:
        """Whether a pre-tokenizer splits text into words before it is split into tokens."""
        return len(set(self._backend.encode("a b c", add_special_tokens=False).word_ids)) > 1

    def starts(self, text: str) -> set[int]:
        """Character offsets at which the words of `text` start; its tokens, where the tokenizer has no words."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        words = [None, *encoding.word_ids]
        return {
            start
            for (start, _), word, before in zip(encoding.offsets, encoding.word_ids, words, strict=False)
            if word is None or word != before or not self.has_words
        }

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], schema: Mapping[str, Any] | None
    ) -> tuple[str, list[_Span]]:
        """The rendered template with control tokens renamed, and the spans of the user's contents in it."""
        spelled: list[str] = []
        messages = [self._guard(message, spelled, ("role", "content")) for message in messages]
        tools = [self._guard(tool, spelled) for tool in tools]
        schema = None if schema is None else self._guard(schema, spelled)
        marks = [self._mark(i) for i in range(len(messages))]
        rendered, contents = self._shown(messages, marks, self._layout(_marked(messages, marks), tools, schema))
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

    def _guard(self, fields: Message, spelled: list[str], leave: Sequence[str] = ()) -> Message:
        """The fields (a message's but for its content, a tool's) with marks for the control tokens spelled in
        them, in a name or a tool call, say; they are appended to `spelled`."""

        def mark(found: re.Match[str]) -> str:
            spelled.append(found[0])
            return self._spelled(len(spelled) - 1)

        def guarded(value: Any) -> Any:
            if isinstance(value, str):
                return self._find_control.sub(mark, value)
            if isinstance(value, Mapping):
                return {guarded(key): guarded(inner) for key, inner in value.items()}
            return [guarded(inner) for inner in value] if isinstance(value, list | tuple) else value

        return {guarded(key): value if key in leave else guarded(value) for key, value in fields.items()}

    def _mark(self, index: int) -> str:
        """Stands for a message's content while the template is rendered."""
        return f"\ue000{self._nonce}\ue002{index}\ue001"

    def _spelled(self, index: int) -> str:
        """Stands for a control token spelled in another field."""
        return f"\ue000{self._nonce}\ue003{index}\ue001"

    def _layout(
        self, marked: Sequence[Message], tools: Sequence[Mapping[str, Any]], schema: Mapping[str, Any] | None
    ) -> Layout:
        """The first way of putting the messages that the template neither refuses nor leaves a part out of."""
        in_words = convention.tools_text(tools) if tools else ""
        form = "" if schema is None else convention.schema_text(schema)
        both = "\n\n".join(filter(None, (in_words, form)))
        calls = any(message["role"] == "assistant" and message.get("tool_calls") for message in marked)
        ways: list[tuple[Callable, Sequence[Mapping[str, Any]], str]] = []
        if not calls or self._shows_calls:
            ways += [(list, tools, form)] * bool(tools and self._shows_tools) + [(list, (), both)]
        ways += [(convention.written_out, (), both), (convention.alternating, (), both)]
        refusal = None
        for arrange, shown, said in ways:
            layout = partial(self._laid_out, arrange, shown, said)
            try:
                if said in layout(marked):
                    return layout
            except PromptError as error:
                refusal = refusal or error
        raise refusal or PromptError("the chat template leaves out what it is told of tools and of the answer's form")

    def _laid_out(
        self, arrange: Callable, tools: Sequence[Mapping[str, Any]], said: str, messages: Sequence[Message]
    ) -> str:
        return self._apply(arrange(convention.with_system(messages, said)), tools)

    @cached_property
    def _shows_tools(self) -> bool:
        """Whether the chat template has a place for tools."""
        mark = self._mark(0)
        tool = {"type": "function", "function": {"name": mark, "description": "a", "parameters": {"type": "object"}}}
        try:
            return mark in self._apply([{"role": "user", "content": "a"}], [tool])
        except PromptError:
            return False

    @cached_property
    def _shows_calls(self) -> bool:
        """Whether the chat template has a place for calls and their results."""
        name, argument, result = (self._mark(i) for i in range(3))
        call = {"type": "function", "id": "a1b2c3d4e", "function": {"name": name, "arguments": {"a": argument}}}
        dialogue: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a1b2c3d4e", "name": name, "content": result},
        ]
        try:
            rendered = self._apply(dialogue)
        except PromptError:
            return False
        return all(mark in rendered for mark in (name, argument, result))

    def _shown(self, messages: Sequence[Message], marks: Sequence[str], layout: Layout) -> tuple[str, list[str]]:
        """The rendered template with a mark for each content, and the contents as it shows them: most
        templates leave them alone, some trim them or drop a part."""
        marked = _marked(messages, marks)
        rendered = layout(marked)
        contents = [message["content"] for message in messages]
        if self._fill(rendered, marks, contents) == layout(messages):
            return rendered, contents
        for i, mark in enumerate(marks):
            alone = layout([*marked[:i], messages[i], *marked[i + 1 :]])
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

    def _apply(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=True,
                chat_template=None if self.template else PLAIN_TEMPLATE,
            )
        except Exception as error:  # jinja raises what the template's author chose
            roles = ", ".join(str(message["role"]) for message in messages)
            raise PromptError(f"the chat template refuses messages with roles [{roles}]: {error}") from error


def _marked(messages: Sequence[Message], marks: Sequence[str]) -> list[Message]:
    return [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]


def _template_text(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):  # several named templates
        template = template.get("default") or "".join(template.values())
    return template or None


def _merge_pieces(pair: str | Sequence[str]) -> set[str]:
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return {left, right, left + right}
