"""How a server serves."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """How a server serves.

    Attributes:
        keys: of which a request must bring one; none: it need not.
        running: requests that run at once.
        queue: requests that may wait beyond these; more are sent away with 429.
        timeout: most seconds of a request, with its wait.
        body_bytes: most bytes of a request.
        body_seconds: within which it must be there.
        texts: most prompts, documents or answers (n) of one request.
        hosts: names that requests may call this server by; none: any. On loopback, a page of another site could else
            reach it under a name of its own that leads here (DNS rebinding).
        origins: web pages that may ask, as in https://example.org; "*": all.
        log_prompts: whether requests are logged as they are.
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
