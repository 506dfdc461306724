"""The spec of a model on a server: [NAME=]URL#MODEL[?key=VARIABLE&tokenizer=PATH&timeout=SECONDS]."""

from __future__ import annotations

import os
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, urlsplit

from pydantic import SecretStr

from packllm.engines.server.http import is_loopback
from packllm.errors import LoadError, guess

SILENCE = 300.0
"""Default timeout: a request fails after this many seconds without a byte from the server."""

_SPEC = re.compile(r"(?:([\w.-]+)=)?(https?://\S+)", re.IGNORECASE)
_WORDS = ("key", "tokenizer", "timeout")
_KEY = re.compile(r"[!-~]+")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


def is_address(text: str) -> bool:
    """Whether a spec is the address of a model on a server: [NAME=]http[s]://..."""
    return _SPEC.match(text) is not None


@dataclass(frozen=True)
class Address:
    """A parsed spec.

    Attributes:
        name: the member's name; None: the model's name is used.
        url: the server's base URL, including /v1.
        model: the model's name on the server; None: the server's only model.
        variable: the environment variable that holds the API key.
        tokenizer: hub id, folder or .gguf file of the server's tokenizer, or None.
        timeout: seconds without a byte from the server after which a request fails.
    """

    name: str | None
    url: str
    model: str | None
    variable: str | None = None
    tokenizer: str | None = None
    timeout: float = SILENCE

    @classmethod
    def of(cls, spec: str) -> Address:
        """Parse a spec.

        Raises:
            LoadError: the spec is not a valid address. The message does not quote it if it may hold a secret.
        """
        match = _SPEC.fullmatch(spec)
        parts = None
        if match is not None:
            with suppress(ValueError):  # [::1, or a port that is no number
                split = urlsplit(match[2])
                parts = split if split.hostname and split.port != 0 else None
        if match is None or parts is None:
            raise LoadError(
                "the address of a server must have the form https://HOST/v1#MODEL; this one has no host, a host or a "
                "port that cannot be, or white space"
            )
        if parts.username is not None or parts.password is not None:
            raise LoadError(
                f"the address of a server on {parts.hostname!r} contains a user name or password; instead, name the "
                f"environment variable that holds the key: https://{parts.hostname}/v1#MODEL?key=VARIABLE"
            )
        model, _, after = parts.fragment.partition("?")
        parameters = dict(parse_qsl("&".join(filter(None, (parts.query, after))), keep_blank_values=True))
        unknown = next((word for word in parameters if word not in _WORDS), None)
        if unknown is not None:
            raise LoadError(
                f"the address of a server on {parts.hostname!r} has an unknown parameter {unknown!r}"
                f"{guess(unknown, _WORDS)} Valid: {', '.join(_WORDS)}"
            )
        variable = parameters.get("key")
        if variable is not None and not _VARIABLE.fullmatch(variable):
            raise LoadError(
                f"key= of a server on {parts.hostname!r} must be the name of an environment variable in capitals, such "
                f"as OPENAI_API_KEY; put the key itself into that variable"
            )
        try:
            timeout = float(parameters.get("timeout", SILENCE))
        except ValueError:
            timeout = 0.0
        if not 0 < timeout < float("inf"):
            raise LoadError(f"timeout={parameters['timeout']!r} of a server must be a number of seconds greater than 0")
        url = f"{parts.scheme.lower()}://{parts.netloc}{parts.path}".rstrip("/")
        return cls(match[1], url, model or None, variable, parameters.get("tokenizer"), timeout)

    @property
    def spec(self) -> str:
        """The spec as text; Address.of reads it back."""
        parameters = {"key": self.variable, "tokenizer": self.tokenizer, "timeout": f"{self.timeout:g}"}
        query = "&".join(f"{word}={quote(value, safe='/:')}" for word, value in parameters.items() if value is not None)
        return f"{'' if self.name is None else f'{self.name}='}{self.url}#{self.model or ''}?{query}"

    @property
    def called(self) -> str:
        """The member's name: as given in the spec, or derived from the model or the URL."""
        return self.name or os.path.basename((self.model or self.url).rstrip("/")).removesuffix(".gguf")

    def key(self) -> SecretStr | None:
        """The API key, read from the environment variable; None if the spec names no variable.

        Raises:
            LoadError: the variable is not set, or holds what no header can; the message does not quote it.
        """
        if self.variable is None:
            return None
        value = os.environ.get(self.variable, "").strip()
        if not value:
            raise LoadError(
                f"the environment variable {self.variable!r}, which should hold the API key of {self.url}, is not set"
            )
        if not _KEY.fullmatch(value):  # the libraries below would quote it
            raise LoadError(
                f"the environment variable {self.variable!r} holds no API key: white space or characters beyond "
                "ASCII; set it to the key alone, without 'Bearer'"
            )
        host = urlsplit(self.url).hostname or ""
        if self.url.startswith("http://") and not is_loopback(host):
            message = f"the key in {self.variable} is sent to {self.url} unencrypted; use https"
            warnings.warn(message, stacklevel=2)
        return SecretStr(value)
