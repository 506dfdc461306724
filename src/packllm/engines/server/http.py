"""Requests to an OpenAI-compatible server: sent, tried again, and given up with a reason that holds no key."""

from __future__ import annotations

import contextlib
import json
import queue
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from pydantic import SecretStr

from packllm.errors import ExtraError

try:
    import httpx
except ImportError:  # of the extra `server`
    httpx = None  # type: ignore[assignment]

ATTEMPTS = 5
"""Times that a request is sent before it is given up."""

BACKOFF = 0.5
"""Seconds before the second attempt; twice as many before each further one."""

LONGEST = 60.0
"""Most seconds that are waited for a server that says when to come again."""

_TICK = 0.05  # seconds between looks at whether anybody still waits
_BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})

Gate = Callable[[], object]

T = TypeVar("T")


def unguarded() -> None:
    """A gate that lets all pass."""


class ServerError(Exception):
    """What a server refused, or why it is given up.

    Attributes:
        status: of its answer, None where there was none.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class Again(ServerError):
    """A failure that may pass: no connection, a busy server, half an answer.

    Attributes:
        after: seconds after which the server asks to be asked again.
    """

    def __init__(self, reason: str, status: int | None = None, after: float | None = None) -> None:
        super().__init__(reason, status)
        self.after = after


class Endpoint:
    """Where a server takes requests. Safe to use from several threads.

    Args:
        url: up to and with /v1.
        key: goes into the header Authorization, and nowhere else.
        silence: seconds without a byte after which a request is given up.
    """

    def __init__(self, url: str, key: SecretStr | None, silence: float) -> None:
        if httpx is None:
            raise ExtraError("a member on a server", "httpx", "server")
        self.url, self._key, self.silence = url.rstrip("/"), key, silence
        here = is_loopback(httpx.URL(url).host)
        headers = {} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"}
        self.client = httpx.Client(headers=headers, trust_env=not here)

    def ask(
        self,
        path: str,
        body: Any = None,
        gate: Gate = unguarded,
        attempts: int = ATTEMPTS,
        silence: float | None = None,
    ) -> Any:
        """The JSON that answers a GET, or a POST of a body; `silence` where less of it is borne than elsewhere.

        Raises:
            ServerError: the server refuses, or fails at all attempts.
            CancelledError, AnswerTimeout: the gate said so.
        """
        tries = Tries(gate, attempts)
        while True:
            try:
                with contextlib.closing(self.send(path, body, gate, silence)) as call:
                    for answer in call:
                        return answer
                raise Again(f"{self.url}{path} gave an empty answer")
            except Again as error:
                failed = error
            tries.wait(failed)

    def send(self, path: str, body: Any = None, gate: Gate = unguarded, silence: float | None = None) -> Call:
        """One attempt: see Call."""
        return Call(self, path, body, gate, min(silence or self.silence, self.silence))

    def safe(self, text: str) -> str:
        """A text that may be shown: one line, cut, without the key."""
        if self._key is not None:
            text = text.replace(self._key.get_secret_value(), "***")
        text = " ".join(text.split())
        return text if len(text) <= 300 else f"{text[:300]}…"


def together(works: Sequence[Callable[[], T]]) -> list[T]:
    """What each of these gives, all at the same time. Where one fails, the others are not waited for."""
    if len(works) == 1:
        return [works[0]()]
    pool = ThreadPoolExecutor(max(1, len(works)))
    try:
        begun = [pool.submit(work) for work in works]
        return [one.result() for one in begun]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Tries:
    """How often something was tried that may pass.

    Args:
        gate: asked while waiting.
        attempts: most of them in a row.
    """

    def __init__(self, gate: Gate, attempts: int = ATTEMPTS) -> None:
        self._gate, self._attempts, self._failed = gate, attempts, 0

    def reset(self) -> None:
        """It went on: what failed before does not count any more."""
        self._failed = 0

    def wait(self, error: Again) -> None:
        """Until the next attempt.

        Raises:
            ServerError: there is none any more.
        """
        self._failed += 1
        if self._failed >= self._attempts:
            raise ServerError(f"{error}; given up after {self._failed} attempts", error.status) from None
        if error.after is not None and error.after > LONGEST:
            raise ServerError(f"{error}; it asks to come again in {error.after:.0f} seconds", error.status) from None
        pause = BACKOFF * 2 ** (self._failed - 1) * (0.5 + random.random())
        until = time.monotonic() + max(pause, error.after or 0.0)
        while (left := until - time.monotonic()) > 0:
            self._gate()
            time.sleep(min(left, _TICK))
        self._gate()


class Call:
    """A request in a thread of its own, so that whoever waits for it can stop at any time: close() drops the
    connection. Iterate to get each event of a stream, or the one JSON that is the answer."""

    def __init__(self, endpoint: Endpoint, path: str, body: Any, gate: Gate, silence: float) -> None:
        self._endpoint, self._what, self._gate = endpoint, endpoint.url + path, gate
        self._timeout = httpx.Timeout(silence, connect=min(silence, 10.0))
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._socket: Any = None
        threading.Thread(target=self._run, args=(body,), daemon=True, name="packllm-request").start()

    def __iter__(self) -> Iterator[Any]:
        while True:
            self._gate()
            try:
                item = self._items.get(timeout=_TICK)
            except queue.Empty:
                continue
            if item is None:
                return
            if isinstance(item, ServerError):
                raise item
            yield item

    def close(self) -> None:
        """Let go of it, wherever it is."""
        with self._lock:
            self._closed = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def _run(self, body: Any) -> None:
        end: ServerError | None
        try:
            end = self._sent(body)
        except httpx.TimeoutException as error:
            end = Again(f"{self._what}: no answer in time ({type(error).__name__})")
        except (httpx.HTTPError, httpx.StreamError) as error:
            end = Again(self._endpoint.safe(f"{self._what}: {type(error).__name__}: {error}"))
        except Exception as error:  # whatever it is, whoever waits must hear of it
            end = ServerError(self._endpoint.safe(f"{self._what}: {type(error).__name__}: {error}"))
        self._items.put(end)

    def _sent(self, body: Any) -> ServerError | None:
        method = "GET" if body is None else "POST"
        with self._endpoint.client.stream(method, self._what, json=body, timeout=self._timeout) as response:
            stream = response.extensions.get("network_stream")
            with self._lock:
                if self._closed:
                    return None
                self._socket = None if stream is None else stream.get_extra_info("socket")
            try:
                return self._read(response)
            finally:
                with self._lock:  # from here on the connection may serve another request
                    self._socket = None

    def _read(self, response: httpx.Response) -> ServerError | None:
        if response.status_code != 200:
            response.read()
            return self._refusal(response)
        if "text/event-stream" not in response.headers.get("content-type", ""):
            response.read()
            return self._put(response.text)
        for line in response.iter_lines():
            data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
            if data == "[DONE]" or self._closed:
                break
            if data and (failed := self._put(data)):
                return failed
        return None

    def _put(self, text: str) -> ServerError | None:
        """Hand on what a text holds; an error, where it is none or tells of one."""
        try:
            item = json.loads(text)
        except ValueError:
            return Again(f"{self._what} answered what is no JSON: {self._endpoint.safe(text)[:80]!r}")
        if isinstance(item, dict) and item.get("error"):
            error = item["error"]
            said = self._endpoint.safe(str(error.get("message") if isinstance(error, dict) else error))
            code = error.get("code") if isinstance(error, dict) else None
            fatal = isinstance(code, int) and 400 <= code < 500 and code not in _BUSY
            return (ServerError if fatal else Again)(f"{self._what}: {said}")
        if not isinstance(item, dict):
            return Again(f"{self._what} answered {type(item).__name__} where an object was expected")
        self._items.put(item)
        return None

    def _refusal(self, response: httpx.Response) -> ServerError:
        status = response.status_code
        try:
            said = response.json()
            said = said.get("error", said) if isinstance(said, dict) else said
            said = said.get("message", said) if isinstance(said, dict) else said
        except ValueError:
            said = response.text
        reason = f"{self._what} answered {status}: {self._endpoint.safe(str(said))}"
        if status in (401, 403):
            reason += " (is the key right? the spec names its environment variable: URL#MODEL?key=VARIABLE)"
        if status in _BUSY:
            return Again(reason, status, _seconds(response.headers.get("retry-after")))
        return ServerError(reason, status)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    return host in ("localhost", "::1", "[::1]") or host.startswith("127.")


def _seconds(said: str | None) -> float | None:
    """What the header Retry-After says: a number, or a date."""
    if not said:
        return None
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
