"""The ASGI app: routes, and what they share."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from importlib.resources import files
from threading import Event
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from packllm import __version__
from packllm.pack import Pack
from packllm.serve import chat, completions, responses, scores, tokens
from packllm.serve.admission import Places
from packllm.serve.body import PACK, Body
from packllm.serve.doors import Doors
from packllm.serve.errors import ServeError, dumps, request_id, response_of
from packllm.serve.metrics import Call, Metrics
from packllm.serve.models import Models, Served
from packllm.serve.protocol import (
    Chat,
    Completion,
    Decide,
    Detokenize,
    Rerank,
    Responses,
    Sampled,
    Score,
    Tokenize,
)
from packllm.serve.reply import Events, Named, Reply
from packllm.serve.settings import Settings

_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)

TOKENIZING = 2
"""Requests that are only tokenized at a time. They keep Python busy, so many at once would slow down all streams."""

B = TypeVar("B", bound=Body)

logger = logging.getLogger("packllm.serve")


class Server:
    """State that the routes share.

    Args:
        pack: the pack to serve; None if it is still being loaded, see ready().
    """

    def __init__(self, pack: Pack | None, settings: Settings) -> None:
        self.settings = settings
        self.places = Places(settings.running, settings.queue)
        self.desk = Places(TOKENIZING, settings.queue)  # requests for tokens only, which no member reads
        self.metrics = Metrics(self.places)
        self._models: Models | None = None
        if pack is not None:
            self.ready(pack)

    def ready(self, pack: Pack) -> None:
        """Set the pack; requests are answered from now on."""
        self.metrics.watch(pack)
        self._models = Models(pack)

    @property
    def models(self) -> Models:
        """The served models.

        Raises:
            ServeError: 503, the models are still being loaded.
        """
        if self._models is None:
            raise ServeError(503, "the models are still being loaded; retry soon", "loading", retry_after="2")
        return self._models

    def reply(self, body: B, work: Callable[[Served, B, Call], Events], places: Places | None = None) -> Reply:
        """The response to a request; its work starts when it gets a slot."""
        served, arrived = self.models.find(body.model), time.perf_counter()
        if self.settings.log_prompts:
            logger.info("%s %s", request_id.get(), body.model_dump_json(exclude_unset=True))
        seconds = min(self.settings.timeout, body.timeout or self.settings.timeout)
        stream = isinstance(body, Sampled | Responses) and body.stream
        frame: dict[str, Any] = {"frame": Named(), "end": b""} if isinstance(body, Responses) else {}

        def events(cancel: Event) -> Events:
            return work(served, body, Call(self.metrics, cancel, arrived))

        return Reply(places or self.places, events, stream, seconds, **frame, named=body.named)

    def limit(self, count: int, what: str) -> None:
        """ServeError if one request asks for too many texts."""
        if count > self.settings.texts:
            raise ServeError(400, f"{count} {what} in one request; the limit is {self.settings.texts}", "too_many")


def create_app(pack: Pack | None = None, settings: Settings | None = None) -> FastAPI:
    """Create an ASGI app that serves a pack.

    Args:
        pack: the pack to serve. None: it is loaded elsewhere and passed to app.state.server.ready(); requests before
            that get status 503.
        settings: settings of the server.
    """
    settings = settings or Settings()
    app = FastAPI(title="packllm", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    server = app.state.server = Server(pack, settings)
    app.add_middleware(Doors, settings=settings, metrics=server.metrics)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "x-should-retry"],  # which OpenAI's clients read
        )
    for kind in (HTTPException, RequestValidationError):  # FastAPI's own handlers use another error format
        app.add_exception_handler(kind, _refused)
    _add_routes(app, server)
    return app


def _add_routes(app: FastAPI, server: Server) -> None:
    page = (files("packllm.serve") / "page.html").read_bytes()

    @app.get("/")
    def chat_page() -> Response:
        return Response(page, media_type="text/html", headers={"content-security-policy": _PAGE_POLICY})

    @app.get("/health")
    def health() -> Response:
        return _json({"status": "ok", "models": [served.name for served in server.models]})

    @app.get("/version")
    def version() -> Response:
        return _json({"version": __version__})

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    @app.get("/models", include_in_schema=False)
    def models() -> Response:
        served_models = server.models
        return _json({"object": "list", "data": [served.as_dict(served_models.created) for served in served_models]})

    @app.get("/v1/models/{name:path}")
    @app.get("/models/{name:path}", include_in_schema=False)
    def model(name: str) -> Response:
        return _json(server.models.find(name).as_dict(server.models.created))

    @app.post("/v1/chat/completions")
    @app.post("/chat/completions", include_in_schema=False)
    async def chat_completions(body: Chat) -> Response:
        server.limit(body.n or 1, "answers (n)")
        return server.reply(body, chat.completion)

    @app.post("/v1/completions")
    @app.post("/completions", include_in_schema=False)
    async def text_completions(body: Completion) -> Response:
        server.limit(len(body.prompts) * (body.n or 1), "answers (prompts times n)")
        return server.reply(body, completions.completion)

    @app.post("/v1/responses")
    @app.post("/responses", include_in_schema=False)
    async def make_response(body: Responses) -> Response:
        return server.reply(body, responses.response)

    @app.post("/v1/score")
    @app.post("/score")
    async def score(body: Score) -> Response:
        server.limit(max(len(body.texts(body.text_1)), len(body.texts(body.text_2))), "texts")
        return server.reply(body, scores.score)

    @app.post("/v1/rerank")
    @app.post("/rerank")
    async def rerank(body: Rerank) -> Response:
        server.limit(len(body.documents), "documents")
        return server.reply(body, scores.rerank)

    @app.post("/v1/decisions")
    @app.post("/decisions", include_in_schema=False)
    async def decide(body: Decide) -> Response:
        server.limit(len(body.choices), "choices")
        return server.reply(body, scores.decide)

    @app.post("/tokenize")
    async def tokenize(body: Tokenize) -> Response:
        return server.reply(body, tokens.tokenize, server.desk)

    @app.post("/detokenize")
    async def detokenize(body: Detokenize) -> Response:
        return server.reply(body, tokens.detokenize, server.desk)

    @app.get("/tokenizer_info")
    def tokenizer_info() -> Response:
        return _json(tokens.info(server.models.find(PACK)))


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        what = f"{request.method} {request.url.path}"
        if error.status_code == 405:
            error.detail = f"{what} is not possible; use {(error.headers or {}).get('Allow')}"
        else:
            error.detail = f"{what} does not exist; the base URL for clients ends with /v1"
    return response_of(error)


def _json(value: object) -> Response:
    return Response(dumps(value), media_type="application/json")
