"""Settings of a server."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
        keys: valid API keys; if empty, requests need none.
        running: requests that run at once.
        queue: further requests that may wait; more are rejected with status 429.
        timeout: time limit of a request in seconds, including its wait.
        body_bytes: size limit of a request body.
        body_seconds: seconds within which the body must arrive.
        texts: most prompts, documents or answers (n) of one request.
        hosts: allowed host names of requests; if empty, any. On loopback this stops web pages that reach the server
            under a host name of their own (DNS rebinding).
        origins: origins of web pages that may send requests, such as https://example.org; "*" means all.
        log_prompts: whether complete requests are logged.
    """

    keys: tuple[str, ...] = field(default=(), repr=False)
    running: int = 32
    queue: int = 128
    timeout: float = 600.0
    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    texts: int = 256
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    log_prompts: bool = False
