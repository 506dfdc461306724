"""What names a model on a server: [NAME=]URL#MODEL[?key=VARIABLE&tokenizer=PATH&timeout=SECONDS]."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, urlsplit

from pydantic import SecretStr

from packllm.engines.server.http import is_loopback
from packllm.errors import LoadError, guess

SILENCE = 300.0
"""Seconds without a word after which a request is given up, where the spec says nothing else."""

_SPEC = re.compile(r"(?:([\w.-]+)=)?(https?://\S+)", re.IGNORECASE)
_WORDS = ("key", "tokenizer", "timeout")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


def is_address(text: str) -> bool:
    """Whether a spec names a model on a server: [NAME=]http[s]://..."""
    return _SPEC.match(text) is not None


@dataclass(frozen=True)
class Address:
    """A spec, taken apart.

    Attributes:
        name: what the member is called; None: as the model.
        url: up to and with /v1.
        model: as the server calls it; None: the only one that it has.
        variable: of the environment, which holds the key.
        tokenizer: hub id or folder of the server's tokenizer, where it is to be known here.
        timeout: seconds of silence after which a request is given up.
    """

    name: str | None
    url: str
    model: str | None
    variable: str | None = None
    tokenizer: str | None = None
    timeout: float = SILENCE

    @classmethod
    def of(cls, spec: str) -> Address:
        """
        Raises:
            LoadError: the spec is no address. It is not quoted where it may hold a secret.
        """
        found = _SPEC.fullmatch(spec)
        parts = urlsplit(found[2]) if found else None
        if found is None or parts is None or not parts.hostname:
            raise LoadError("a server is named as https://HOST/v1#MODEL; this one has no host, or holds white space")
        if parts.username is not None or parts.password is not None:
            raise LoadError(
                f"the address of a server on {parts.hostname!r} holds a user or password; name the environment "
                f"variable that holds the key instead: https://{parts.hostname}/v1#MODEL?key=VARIABLE"
            )
        model, _, after = parts.fragment.partition("?")
        words = dict(parse_qsl("&".join(filter(None, (parts.query, after))), keep_blank_values=True))
        unknown = next((word for word in words if word not in _WORDS), None)
        if unknown is not None:
            raise LoadError(
                f"the address of a server on {parts.hostname!r} has an unknown word {unknown!r}"
                f"{guess(unknown, _WORDS)} Valid: {', '.join(_WORDS)}"
            )
        variable = words.get("key")
        if variable is not None and not _VARIABLE.fullmatch(variable):
            raise LoadError(
                f"key= of a server on {parts.hostname!r} takes the name of an environment variable, in capitals, such "
                f"as OPENAI_API_KEY; the key itself goes into that variable"
            )
        try:
            timeout = float(words.get("timeout", SILENCE))
        except ValueError:
            timeout = 0.0
        if not 0 < timeout < float("inf"):
            raise LoadError(f"timeout={words['timeout']!r} of a server must be a number of seconds above 0")
        url = f"{parts.scheme.lower()}://{parts.netloc}{parts.path}".rstrip("/")
        return cls(found[1], url, model or None, variable, words.get("tokenizer"), timeout)

    @property
    def spec(self) -> str:
        """The text that names it."""
        words = {"key": self.variable, "tokenizer": self.tokenizer, "timeout": f"{self.timeout:g}"}
        said = "&".join(f"{word}={quote(value, safe='/:')}" for word, value in words.items() if value is not None)
        return f"{'' if self.name is None else f'{self.name}='}{self.url}#{self.model or ''}?{said}"

    @property
    def called(self) -> str:
        """What the member is called."""
        return self.name or os.path.basename((self.model or self.url).rstrip("/")).removesuffix(".gguf")

    def key(self) -> SecretStr | None:
        """What the environment variable holds."""
        if self.variable is None:
            return None
        value = os.environ.get(self.variable, "").strip()
        if not value:
            raise LoadError(
                f"the environment variable {self.variable!r}, which should hold the key of {self.url}, is not set"
            )
        host = urlsplit(self.url).hostname or ""
        if self.url.startswith("http://") and not is_loopback(host):
            told = f"the key in {self.variable} goes to {self.url} unencrypted, for all on the way to read; use https"
            warnings.warn(told, stacklevel=2)
        return SecretStr(value)
