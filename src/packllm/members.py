"""The members of a pack together: names, token counts, options."""

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
    """The members of a pack, and the requests to them. See Pack.

    Attributes:
        members: the members, in order.
        recipe: arguments of Pack.load that load the same members; None if Member objects were given.
        options: the default options.
        prefixes: the cache of recent prompts, with statistics (see prefix.py).
    """

    def __init__(self, members: Sequence[Author], *, recipe: dict[str, Any] | None = None, **options: Any) -> None:
        if not members:
            raise LoadError("a pack needs at least one member")
        self.members = tuple(members)
        self.recipe = recipe
        self.options = defaults(options)
        self.prefixes = PrefixCache(self.options.prefix_cache_mb * 2**20)
        limit = self.options.max_cache_mb
        self._admission = Admission(None if limit is None else limit * 2**20)
        self.options = self._checked(self.options)
        if (asked := self._asked_for()) and not self.options.generation_config:
            log.info("the members' generation_config asks for %s; set generation_config=True to use it", asked)

    def close(self) -> None:
        """Release the members. The pack cannot answer any more."""
        self.members = ()
        self.prefixes.close()

    @property
    def name(self) -> str:
        """The pack's name, made of its members' names."""
        return "packllm:" + "+".join(member.name for member in self.members)

    @property
    def models(self) -> tuple[Member, ...]:
        """The members, if all are token models that run locally.

        Raises:
            LoadError: a member is on a server.
        """
        for member in self.members:
            if not isinstance(member, Member):
                raise LoadError(f"member {member.name!r} is on a server, and this needs members that run here")
        return tuple(member for member in self.members if isinstance(member, Member))

    @property
    def fingerprint(self) -> str:
        """Hash of the members' weights: use it as the key of cached answers."""
        joined = "".join(member.name + member.fingerprint for member in self.members)
        return hashlib.sha256(joined.encode()).hexdigest()

    @property
    def context_window(self) -> int | None:
        """The smallest context window of the members, in tokens; None if no member has a limit."""
        return min((m.context_window for m in self.members if m.context_window), default=None)

    @property
    def has_chat_template(self) -> bool:
        """Whether every member has a chat template."""
        return all(member.encoder.template for member in self.members)

    @cached_property
    def template_tokens(self) -> int:
        """The largest number of tokens that a member's chat template adds to a user message, or to a system and a user
        message. Some templates also add a system message of their own."""
        user = {"role": "user", "content": "a"}
        return max(
            self._template_tokens(member, dialogue)
            for member in self.members
            for dialogue in ([user], [{"role": "system", "content": "a"}, user])
        )

    @staticmethod
    def _template_tokens(member: Author, dialogue: list[dict[str, Any]]) -> int:
        try:
            total = len(member.encoder.encode(dialogue).ids)
        except PromptError:  # a template may refuse system messages
            return 0
        return total - len(dialogue) * len(member.encoder.plain("a"))

    def tokenize(self, text: str) -> list[int]:
        """Ids of `text` in the tokenizer of the first member that has one locally, without BOS. Special tokens that are
        spelled in the text are encoded as text.

        Raises:
            PackError: all members are on servers, so no tokenizer is known.
        """
        return self.members[self._first].encoder.plain(text)

    @property
    def _first(self) -> int:
        """The first member whose tokenizer is known."""
        for k, member in enumerate(self.members):
            if len(member.vocabulary):
                return k
        raise PackError(
            "tokens cannot be counted: all members are on servers, whose tokenizers are unknown; name one: "
            "URL#MODEL?tokenizer=FOLDER"
        )

    def count_tokens(self, prompt: Prompt, **options: Any) -> int:
        """Number of tokens, in the tokenizer of tokenize(): of a text alone, or of messages with that member's chat
        template and the tools among the options. They may be more than fit a context window.

        Raises:
            OptionError, PromptError: as in stream().
        """
        if isinstance(prompt, str):
            return len(self.tokenize(prompt))
        self._require_open()
        asked = self.check(**options)
        given = asked.weighting if isinstance(asked.weighting, dict) else {member.name: 1.0 for member in self.members}
        running = [k for k, member in enumerate(self.members) if given.get(member.name, 0) != 0]
        encoder = self.members[self._first if self._first in running else min(running)].encoder
        beside = asked.offered_tools, asked.json_schema, asked.chat_template_kwargs
        return len(encoder.encode(check(prompt, self._wraps(prompt, asked)), None, *beside).ids)

    def check(self, **options: Any) -> Options:
        """The options of a request with these changes.

        Raises:
            OptionError, WeightsError: an unknown option or member, or a value out of range.
        """
        options_ = self.options.override(options)
        if options_.generation_config:
            options_ = make_options({**self._asked_for(), **options_.model_dump(exclude_unset=True)})
        return self._checked(options_)

    def _asked_for(self) -> dict[str, Any]:
        """The options that the members' own generation_config sets."""
        settings: dict[str, Any] = {}
        for member in reversed(self.members):
            if not isinstance(member, Member):
                continue
            member_settings = dict(member.engine.asks)
            if not member.vocabulary.same_as(self.members[0].vocabulary):
                member_settings.pop("logit_bias", None)  # its ids must be the first member's
            settings |= member_settings
        return settings

    def _checked(self, options: Options) -> Options:
        """Check options against these members, and read a prior's file.

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
        """Whether a text prompt goes through the chat templates."""
        if options.chat_template is None:
            return self.has_chat_template and not isinstance(prompt, Formatted)
        return options.chat_template

    def _require_open(self) -> None:
        if not self.members:
            raise LoadError("this pack is closed; load it again")

    def _request(self, prompts: Sequence[Prompt], options: Options) -> Request:
        self._require_open()
        checked_prompts = [check(prompt, self._wraps(prompt, options)) for prompt in prompts]
        if options.prefix_cache_mb not in (0, self.options.prefix_cache_mb):
            message = (
                f"prefix_cache_mb={options.prefix_cache_mb} of a request has no effect; it is a property of the pack"
            )
            warnings.warn(message, DeprecationWarning, stacklevel=2)
        mapped = decodings.find(options.decoding).mapped
        request = Request(self.members, options, checked_prompts, self.prefixes, mapped)
        request.admission = self._admission
        return request


def defaults(options: Mapping[str, Any], beside: Sequence[str] = ()) -> Options:
    """Check the default options of a pack."""
    checked = make_options(options, beside)
    if checked.n is not None:
        raise OptionError(
            f"n={checked.n} is an option of requests, not of packs; give it to generate or generate_batch"
        )
    return checked
