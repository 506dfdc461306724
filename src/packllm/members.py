"""The members of a pack as a whole: what they are called, how they count tokens, which options hold for them."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from packllm.chat.formatted import Formatted
from packllm.chat.prompt import Prompt, check
from packllm.decode import decodings
from packllm.decode.admission import Admission
from packllm.decode.moving import check_moving
from packllm.decode.race import check_race
from packllm.decode.request import Request
from packllm.engines.member import Author, Member
from packllm.engines.prefix import PrefixCache
from packllm.errors import LoadError, OptionError, PackError, PromptError
from packllm.options import Options, make_options
from packllm.weights import find, fixed
from packllm.weights.calibrate import prior_of

log = logging.getLogger("packllm")


class Members:
    """What a pack is made of, and the requests that are made of it. See Pack.

    Attributes:
        members: the members, in order.
        recipe: arguments of Pack.load that make these members again; None for Member objects.
        options: the defaults.
        prefixes: what is kept of recent prompts, with statistics (see prefix.py).
    """

    def __init__(self, members: Sequence[Author], *, recipe: dict[str, Any] | None = None, **options: Any) -> None:
        if not members:
            raise LoadError("a pack needs at least one member")
        self.members = tuple(members)
        self.recipe = recipe
        self.options = defaults(options)
        self.prefixes = PrefixCache(self.options.prefix_cache_mb * 2**20)
        most = self.options.max_cache_mb
        self._admission = Admission(None if most is None else most * 2**20)
        self.options = self._checked(self.options)
        if (asked := self._asked_for()) and not self.options.generation_config:
            log.info("the members' generation_config asks for %s; generation_config=True uses it", asked)

    def close(self) -> None:
        """Let go of the members; the pack cannot answer any more."""
        self.members = ()
        self.prefixes.close()

    @property
    def name(self) -> str:
        """The pack's name: its members'."""
        return "packllm:" + "+".join(member.name for member in self.members)

    @property
    def models(self) -> tuple[Member, ...]:
        """The members, all of them token models that run here.

        Raises:
            LoadError: one is on a server.
        """
        for member in self.members:
            if not isinstance(member, Member):
                raise LoadError(f"member {member.name!r} is on a server, and this needs members that run here")
        return tuple(member for member in self.members if isinstance(member, Member))

    @property
    def fingerprint(self) -> str:
        """Hash of the members' contents: what a cache of answers must be keyed by."""
        joined = "".join(member.name + member.fingerprint for member in self.members)
        return hashlib.sha256(joined.encode()).hexdigest()

    @property
    def context_window(self) -> int | None:
        """Tokens that fit every member, None if none has a limit."""
        return min((m.context_window for m in self.members if m.context_window), default=None)

    @property
    def has_chat_template(self) -> bool:
        """Whether every member brings a chat template."""
        return all(member.encoder.template for member in self.members)

    @cached_property
    def template_tokens(self) -> int:
        """Most tokens that a member's chat template writes around a user's message, or around a system's and a
        user's; a system message of its own is among them."""
        user = {"role": "user", "content": "a"}
        return max(
            self._template_tokens(member, dialogue)
            for member in self.members
            for dialogue in ([user], [{"role": "system", "content": "a"}, user])
        )

    @staticmethod
    def _template_tokens(member: Author, dialogue: list[dict[str, Any]]) -> int:
        try:
            whole = len(member.encoder.encode(dialogue).ids)
        except PromptError:  # a template may refuse a system's message
            return 0
        return whole - len(dialogue) * len(member.encoder.plain("a"))

    def tokenize(self, text: str) -> list[int]:
        """Ids of `text` in the first member's tokenizer (of those that have one here), without BOS; special tokens
        spelled in it are text.

        Raises:
            PackError: all members are on servers, so nobody here knows their tokens.
        """
        return self.members[self._first].encoder.plain(text)

    @property
    def _first(self) -> int:
        """The first member whose tokens are known here."""
        for k, member in enumerate(self.members):
            if len(member.vocabulary):
                return k
        raise PackError(
            "tokens cannot be counted: all members are on servers, whose tokenizers are not known here; name one: "
            "URL#MODEL?tokenizer=FOLDER"
        )

    def count_tokens(self, prompt: Prompt, **options: Any) -> int:
        """Tokens as tokenize() has them: of a text by itself, or of messages as that member reads them, with
        its chat template and the tools among the options.

        Raises:
            OptionError, PromptError: as stream().
        """
        if isinstance(prompt, str):
            return len(self.tokenize(prompt))
        encoded = self._request([prompt], self.check(**options)).encoded[0]
        return len(encoded[self._first if self._first in encoded else min(encoded)].ids)

    def check(self, **options: Any) -> Options:
        """The options that a request with these changes would run under.

        Raises:
            OptionError, WeightsError: an unknown option or member, or a value out of range.
        """
        checked = self.options.override(options)
        if checked.generation_config:
            checked = make_options({**self._asked_for(), **checked.model_dump(exclude_unset=True)})
        return self._checked(checked)

    def _asked_for(self) -> dict[str, Any]:
        """What the members' own generation_config asks for."""
        asked: dict[str, Any] = {}
        for member in reversed(self.members):
            if not isinstance(member, Member):
                continue
            own = dict(member.engine.asks)
            if not member.vocabulary.same_as(self.members[0].vocabulary):
                own.pop("logit_bias", None)  # ids are the first member's
            asked |= own
        return asked

    def _checked(self, options: Options) -> Options:
        """The options, which fit these members; a prior's file is read.

        Raises:
            OptionError, WeightsError: an unknown weighting, decoding or member.
        """
        decodings.find(options.decoding)
        check_moving(options)
        check_race(options)
        if isinstance(options.weighting, dict):
            fixed(options.weighting, tuple(member.name for member in self.members), options.pool or "linear")
        else:
            find(options.weighting)
        if options.prior is None:
            return options
        prior = prior_of(options.prior, self.members)
        fixed(prior, tuple(member.name for member in self.members), "linear", "prior")
        return options.model_copy(update={"prior": prior})

    def _wraps(self, prompt: Prompt, options: Options) -> bool:
        """Whether a prompt that is text goes through the chat templates."""
        if options.chat_template is None:
            return self.has_chat_template and not isinstance(prompt, Formatted)
        return options.chat_template

    def _request(self, prompts: Sequence[Prompt], options: Options) -> Request:
        if not self.members:
            raise LoadError("this pack is closed; load it again")
        checked = [check(prompt, self._wraps(prompt, options)) for prompt in prompts]
        if options.prefix_cache_mb not in (0, self.options.prefix_cache_mb):
            told = f"prefix_cache_mb={options.prefix_cache_mb} of a request has no effect; it is a property of the pack"
            warnings.warn(told, DeprecationWarning, stacklevel=2)
        mapped = decodings.find(options.decoding).mapped
        request = Request(self.members, options, checked, self.prefixes, mapped)
        request.admission = self._admission
        return request


def defaults(options: Mapping[str, Any], beside: Sequence[str] = ()) -> Options:
    """Options that a pack may have."""
    made = make_options(options, beside)
    if made.n is not None:
        raise OptionError(f"n={made.n} is of a request, not of a pack; give it to generate or generate_batch")
    return made
