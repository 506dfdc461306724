"""An OpenAI-compatible server with vLLM's fields, over a real tiny model in this process; and all that can go wrong."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from conftest import CORPUS as ALL
from scripted import follows

from packllm import Member
from packllm.engines.base import Read

CORPUS = ALL[:5]


def english(tokenizer, name: str, corpus: list[str] = CORPUS, end: float = 0.5, apart: float = 0.0) -> Member:
    """A real Llama that knows which token follows which in a corpus, and that answers end after a full stop.

    Args:
        apart: by how much each of those that follow equally often is likelier than the next.
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    for text in corpus:
        pieces = [tokenizer.decode([i]) for i in tokenizer(text, add_special_tokens=False).input_ids]
        for before, after in itertools.pairwise(pieces):
            counts[before][after] += 1
    table = {
        a: {b: 0.9 * n / following.total() * (1 - apart * at) for at, (b, n) in enumerate(following.items())}
        for a, following in counts.items()
    }
    table["\n"] = {"The": 0.9}
    table["."] = {piece: p * (1 - end) for piece, p in table.get(".", {}).items()} | {"END": end}
    return follows(tokenizer, table, name, window=2048)


MOST = 20  # likeliest next tokens that are told, as vLLM has it


class Broken(Exception):
    """The connection is dropped here."""


class Served:
    """A server on loopback.

    Args:
        member: what it runs.
        model: what it calls that.

    Attributes:
        url: up to /v1.
        log: (path, body, headers) of each request.
        dropped: set when the reader of a stream went away.
        endless: streams write on for ever.
        fault: called with the path and the body before each answer; gives None, or (status, headers, body) to answer
            instead, or raises Broken.
        change: called with the path and the answer, which it may change.
        cut: pieces of a stream after which the connection breaks, by number of the stream.
    """

    def __init__(self, member: Member, model: str = "tiny") -> None:
        self.member, self.model = member, model
        self.log: list[tuple[str, Any, dict[str, str]]] = []
        self.streams, self.endless, self.dropped = 0, False, threading.Event()
        self.fault: Callable[[str, Any], Any] = lambda path, body: None
        self.change: Callable[[str, Any], Any] = lambda path, answer: answer
        self.cut: dict[int, int] = {}
        self.knows_continue = True
        self.done = threading.Event()
        served = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                """Nothing is written."""

            def do_GET(self) -> None:
                served._answer(self, None)

            def do_POST(self) -> None:
                served._answer(self, json.loads(self.rfile.read(int(self.headers["content-length"]))))

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A reader that went away is no news."""

        self.http = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def spec(self, name: str = "far", words: str = "") -> str:
        return f"{name}={self.url}#{self.model}{words}"

    def close(self) -> None:
        self.done.set()
        self.http.shutdown()
        self.http.server_close()

    def asked(self, path: str) -> list[Any]:
        return [body for at, body, _ in self.log if at == path]

    def _answer(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        path = handler.path.removeprefix("/v1")
        self.log.append((path, body, dict(handler.headers.items())))
        try:
            status, headers, content = self.fault(path, body) or (200, {}, None)
            if content is None:
                if body is not None and body.get("stream"):
                    self._stream(handler, path, body)
                    return
                content = json.dumps(self.change(path, self._whole(path, body)))
            data = content.encode()
            handler.send_response(status)
            for name, value in {
                "content-type": "application/json",
                "content-length": str(len(data)),
                **headers,
            }.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(data)
        except ValueError as error:
            data = json.dumps({"error": {"message": f"{error} is out of range"}}).encode()
            handler.send_response(400)
            handler.send_header("content-length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)
        except Broken:
            handler.close_connection = True
        except (BrokenPipeError, ConnectionResetError):
            self.dropped.set()
            handler.close_connection = True

    # The model

    def _ids(self, path: str, body: Any) -> list[int]:
        encoder = self.member.encoder
        if path == "/completions":
            prompt = body["prompt"]
            return encoder.encode(prompt).ids if isinstance(prompt, str) else list(prompt)
        messages = list(body["messages"])
        begun = None
        if self.knows_continue and body.get("continue_final_message"):
            begun = messages.pop()["content"]
        ids = encoder.encode(messages).ids
        return ids if begun is None else [*ids, *encoder.plain(begun)]

    def rows(self, ids: list[int]) -> torch.Tensor:
        with closing(self.member.open()) as sequence:
            (rows,) = self.member.engine.read([Read(sequence, ids, "all")])
        return rows

    def _generated(self, ids: list[int], most: int) -> Iterator[tuple[int, torch.Tensor]]:
        ids = list(ids)
        for _ in range(most):
            row = self.rows(ids)[-1]
            token = int(row.argmax())
            yield token, row
            ids.append(token)
            if token in self.member.end_ids:
                return

    def text(self, token: int) -> str:
        return self.member.tokenizer.decode([token])

    def _top(self, row: torch.Tensor, body: Any) -> dict[str, float]:
        if body["logprobs"] > MOST:
            raise ValueError("logprobs")
        ids = [*row.topk(min(body["logprobs"], len(row))).indices.tolist(), *body.get("logprob_token_ids", ())]
        named = body.get("return_tokens_as_token_ids")
        return {f"token_id:{i}" if named else self.text(i): float(row[i]) for i in ids}

    def _whole(self, path: str, body: Any) -> Any:
        if path == "/models":
            return {"object": "list", "data": [{"id": self.model, "object": "model"}]}
        chat, ids = path == "/chat/completions", self._ids(path, body)
        drawn = list(self._generated(ids, body.get("max_tokens", 16)))
        ended = bool(drawn) and drawn[-1][0] in self.member.end_ids
        said = "".join(self.text(token) for token, _ in drawn if token not in self.member.end_ids)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if ended else "length"}
        answer = {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": len(drawn)}}
        rows = self.rows(ids)
        if body.get("prompt_logprobs") is not None:
            told: list[Any] = [None]
            for row, token in zip(rows, ids[1:], strict=False):
                entry = {str(token): {"logprob": float(row[token]), "decoded_token": self.text(token)}}
                for other in row.topk(body["prompt_logprobs"]).indices.tolist():
                    entry.setdefault(str(other), {"logprob": float(row[other]), "decoded_token": self.text(other)})
                told.append(entry)
            (answer if chat else choice)["prompt_logprobs"] = told
        if chat:
            choice["message"] = {"role": "assistant", "content": said}
            if body.get("logprobs"):
                content = [{"token": self.text(t), "logprob": float(row[t])} for t, row in drawn]
                choice["logprobs"] = {"content": content}
            return answer
        choice["text"] = said
        if body.get("logprobs") is not None:
            first = [(ids[0], None), *((token, row) for row, token in zip(rows, ids[1:], strict=False))]
            listed = [*(first if body.get("echo") else []), *drawn]
            choice["logprobs"] = {
                "tokens": [self.text(t) for t, _ in listed],
                "token_logprobs": [None if row is None else float(row[t]) for t, row in listed],
                "top_logprobs": [None if row is None else self._top(row, body) for _, row in listed],
            }
        return answer

    def _stream(self, handler: BaseHTTPRequestHandler, path: str, body: Any) -> None:
        cut = self.cut.get(self.streams)
        self.streams += 1
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()

        def send(data: str) -> None:
            chunk = f"data: {data}\n\n".encode()
            handler.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
            handler.wfile.flush()

        ids, count, reason = self._ids(path, body), 0, "length"
        for token, _ in self._generated(ids, body.get("max_tokens", 16)):
            if token in self.member.end_ids:
                reason = "stop"
                break
            if count == cut:
                raise Broken
            count += 1
            text = self.text(token)
            choice = {"text": text} if path == "/completions" else {"delta": {"content": text}}
            send(json.dumps({"choices": [{"index": 0, **choice, "finish_reason": None}]}))
        while self.endless:
            send(json.dumps({"choices": [{"index": 0, "delta": {"content": " on"}, "finish_reason": None}]}))
        last = {"text": ""} if path == "/completions" else {"delta": {}}
        send(json.dumps({"choices": [{"index": 0, **last, "finish_reason": reason}]}))
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": len(ids), "completion_tokens": count}
            send(json.dumps({"choices": [], "usage": usage}))
        send("[DONE]")
        handler.wfile.write(b"0\r\n\r\n")
