"""HTTP requests to an OpenAI-compatible server: sending, retrying, and errors that never contain the API key."""

from __future__ import annotations

import contextlib
import ipaddress
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
except ImportError:  # installed with the extra `server`
    httpx = None  # type: ignore[assignment]

ATTEMPTS = 5
"""How often a request is sent before it fails."""

BACKOFF = 0.5
"""Seconds before the second attempt; the pause doubles with each further attempt."""

LONGEST = 60.0
"""Longest wait in seconds that a server may request with Retry-After."""

_TICK = 0.05  # seconds between calls of the gate
_BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})

Gate = Callable[[], object]

T = TypeVar("T")


def no_gate() -> None:
    """A gate that never raises."""


class ServerError(Exception):
    """A request failed.

    Attributes:
        status: HTTP status of the answer; None if there was no answer.
        said: the part of the reason that is the server's own text; see errors.unquoted.
    """

    def __init__(self, reason: str, status: int | None = None, said: str = "") -> None:
        super().__init__(reason)
        self.status, self.said = status, said


class TransientError(ServerError):
    """A failure that another attempt may cure: no connection, a busy server, an incomplete answer.

    Attributes:
        after: seconds that the server asks to wait.
    """

    def __init__(self, reason: str, status: int | None = None, after: float | None = None, said: str = "") -> None:
        super().__init__(reason, status, said)
        self.after = after


class Endpoint:
    """The API of a server. Safe to use from several threads.

    Args:
        url: base URL, including /v1.
        key: sent in the header Authorization, and nowhere else.
        silence: seconds without a byte from the server after which a request fails.
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
        gate: Gate = no_gate,
        attempts: int = ATTEMPTS,
        silence: float | None = None,
    ) -> Any:
        """Send a request and return the JSON object of its answer.

        Args:
            path: appended to the base URL.
            body: JSON body of a POST; None for a GET.
            gate: called regularly while waiting; it raises to stop the request.
            attempts: how often the request is sent before it fails.
            silence: a timeout shorter than the endpoint's.

        Raises:
            ServerError: the server refused the request, or all attempts failed.
            CancelledError, AnswerTimeout: raised by the gate.
        """
        tries = Retries(gate, attempts)
        while True:
            try:
                with contextlib.closing(self.send(path, body, gate, silence)) as call:
                    for answer in call:
                        return answer
                raise TransientError(f"{self.url}{path} returned an empty answer")
            except TransientError as error:
                failed = error
            tries.wait(failed)

    def send(self, path: str, body: Any = None, gate: Gate = no_gate, silence: float | None = None) -> Call:
        """Start one attempt; see Call."""
        return Call(self, path, body, gate, min(silence or self.silence, self.silence))

    def safe(self, text: str) -> str:
        """A text for error messages: on one line, shortened, without the key."""
        if self._key is not None:
            text = text.replace(self._key.get_secret_value(), "***")
        text = " ".join(text.split())
        return text if len(text) <= 300 else f"{text[:300]}…"


def together(works: Sequence[Callable[[], T]]) -> list[T]:
    """Run functions at the same time; return their results. If one fails, the others are not awaited."""
    if len(works) == 1:
        return [works[0]()]
    pool = ThreadPoolExecutor(max(1, len(works)))
    try:
        futures = [pool.submit(work) for work in works]
        return [one.result() for one in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Retries:
    """Counts failed attempts, and waits between them.

    Args:
        gate: called while waiting.
        attempts: most failures in a row.
    """

    def __init__(self, gate: Gate, attempts: int = ATTEMPTS) -> None:
        self._gate, self._attempts, self._failed = gate, attempts, 0

    def reset(self) -> None:
        """An attempt made progress: earlier failures no longer count."""
        self._failed = 0

    def wait(self, error: TransientError) -> None:
        """Wait until the next attempt.

        Raises:
            ServerError: no attempts are left, or the server asks for a longer wait than LONGEST.
        """
        self._failed += 1
        if self._failed >= self._attempts:
            raise ServerError(f"{error}; failed after {self._failed} attempts", error.status, error.said) from None
        if error.after is not None and error.after > LONGEST:
            reason = f"{error}; it asks to retry after {error.after:.0f} seconds"
            raise ServerError(reason, error.status, error.said) from None
        pause = BACKOFF * 2 ** (self._failed - 1) * (0.5 + random.random())
        until = time.monotonic() + max(pause, error.after or 0.0)
        while (left := until - time.monotonic()) > 0:
            self._gate()
            time.sleep(min(left, _TICK))
        self._gate()


class Call:
    """A request that runs in its own thread, so that the caller can stop waiting at any time: close() drops the
    connection. Iterating yields the events of a stream, or the one JSON object of another answer."""

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
        """Stop the request, in any state."""
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
            end = TransientError(f"{self._what}: no answer in time ({type(error).__name__})")
        except (httpx.HTTPError, httpx.StreamError) as error:
            end = TransientError(self._endpoint.safe(f"{self._what}: {type(error).__name__}: {error}"))
        except Exception as error:  # the waiting thread must get any error
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
        """Queue a JSON object for the caller. Returns an error if the text is not JSON, or reports an error."""
        try:
            item = json.loads(text)
        except ValueError:
            said = repr(self._endpoint.safe(text)[:80])
            return TransientError(f"{self._what} returned invalid JSON: {said}", said=said)
        if isinstance(item, dict) and item.get("error"):
            error = item["error"]
            message = self._endpoint.safe(str(error.get("message") if isinstance(error, dict) else error))
            code = error.get("code") if isinstance(error, dict) else None
            fatal = isinstance(code, int) and 400 <= code < 500 and code not in _BUSY
            return (ServerError if fatal else TransientError)(f"{self._what}: {message}", said=message)
        if not isinstance(item, dict):
            return TransientError(f"{self._what} returned a JSON {type(item).__name__} instead of an object")
        if not isinstance(item.get("usage"), dict):
            item.pop("usage", None)
        self._items.put(item)
        return None

    def _refusal(self, response: httpx.Response) -> ServerError:
        status = response.status_code
        try:
            message = response.json()
            message = message.get("error", message) if isinstance(message, dict) else message
            message = message.get("message", message) if isinstance(message, dict) else message
        except ValueError:
            message = response.text
        said = self._endpoint.safe(str(message))
        reason = f"{self._what} returned status {status}: {said}"
        if status in (401, 403):
            reason += " (check the API key; the spec names its environment variable: URL#MODEL?key=VARIABLE)"
        if status in _BUSY:
            return TransientError(reason, status, _seconds(response.headers.get("retry-after")), said)
        return ServerError(reason, status, said)


def is_loopback(host: str) -> bool:
    """Whether a host name means the local machine."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def _seconds(header: str | None) -> float | None:
    """Seconds in a Retry-After header, which has a number or a date."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
