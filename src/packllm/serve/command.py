"""packllm serve: the server on the command line."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packllm import cli
from packllm.cli import Models, Others, WeightingName
from packllm.errors import ExtraError, OptionError

if TYPE_CHECKING:
    from packllm.serve.app import Server

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command()
def serve(
    model: Models = None,
    weighting: WeightingName = None,
    prior: Annotated[
        str | None, typer.Option(metavar="FILE", help="What `packllm calibrate` found: weights to start from.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is all the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    uds: Annotated[str | None, typer.Option(metavar="PATH", help="Listen on a unix socket instead.")] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Environment variable with the key, or several keys, one a line."),
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 32,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait beyond; then 429.")] = 128,
    timeout: Annotated[float, typer.Option(min=0.1, help="Most seconds of a request, with its wait.")] = 600,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Most MiB of a request.")] = 4,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name that this server is asked by, where it listens on loopback."),
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="A web page that may ask, as https://example.org.")
    ] = None,
    drain: Annotated[int, typer.Option(min=0, help="Seconds that answers under way have after SIGTERM.")] = 60,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log requests with all that they say.")] = False,
    option: Others = None,
) -> None:
    """Serve the pack behind OpenAI's protocol.

    Models are `pack` and each member by its name. It listens on this machine
    alone unless --host says otherwise. SIGTERM ends it once answers are whole.

    [dim]Examples:[/]

    packllm serve

    packllm serve -m ./base -m ./base+./law --port 8080 --api-key-env PACK_KEY
    """
    try:
        import uvicorn

        from packllm.serve.app import create_app
        from packllm.serve.settings import Settings
    except ImportError as error:
        raise ExtraError("packllm serve", str(error.name), "serve") from error
    options = cli._options(weighting, option, {} if prior is None else {"prior": prior})
    settings = Settings(
        keys=_keys(api_key_env),
        running=max_running,
        queue=max_queue,
        timeout=timeout,
        body_bytes=max_body_mb * 2**20,
        hosts=_hosts(host, uds, allow_host or []),
        origins=tuple(cors or ()),
        log_prompts=log_prompts,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    made = create_app(settings=settings)
    config = uvicorn.Config(
        made,
        host=host,
        port=port,
        uds=uds,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=drain,
        lifespan="off",
    )
    server = uvicorn.Server(config)
    loading = _Loading(made.state.server, server, model, options)
    loading.start()
    try:
        server.run()
    except OSError as error:
        raise OptionError(f"cannot listen at {uds or f'{host}:{port}'}: {error}") from error
    loading.raise_failure()


class _Loading(threading.Thread):
    """Loads the models while the server already answers /health, and says how far it is."""

    def __init__(self, ours: Server, uvicorn_server: Any, models: list[str] | None, options: dict[str, Any]) -> None:
        super().__init__(daemon=True, name="packllm-loading")
        self._ours, self._server, self._models, self._options = ours, uvicorn_server, models, options
        self._failure: Exception | None = None

    def run(self) -> None:
        started = time.monotonic()
        what = ", ".join(self._models) if self._models else "the starter pack"
        typer.echo(f"packllm: loading {what}; /health is 503 until it is done", err=True)
        try:
            pack = cli._load(self._models, self._options)
            self._ours.ready(pack)
        except Exception as error:
            self._failure = error
            self._server.should_exit = True
            return
        while not self._server.started and not self._server.should_exit:
            time.sleep(0.01)
        names = ", ".join(served.name for served in self._ours.models)
        typer.echo(f"packllm: ready after {time.monotonic() - started:.1f} s; models: {names}", err=True)
        typer.echo(self._hello(), err=True)

    def raise_failure(self) -> None:
        """What kept the models from being loaded, if anything did."""
        if self._failure is not None:
            raise self._failure

    def _hello(self) -> str:
        """Where it listens, and a line that asks it."""
        config, keys = self._server.config, self._ours.settings.keys
        where, socket = "http://localhost", f"--unix-socket {config.uds} " if config.uds else ""
        note = "a unix socket"
        if not config.uds:
            bound = self._server.servers[0].sockets[0].getsockname()
            host = bound[0] if bound[0] not in ("0.0.0.0", "::") else "127.0.0.1"
            where = f"http://[{host}]:{bound[1]}" if ":" in host else f"http://{host}:{bound[1]}"
            here = host.startswith("127.") or host == "::1"
            note = "this machine alone (--host)" if here and bound[0] == host else "the network"
            if not here and not keys:
                note += ", without a key (--api-key-env)"
        key = ' -H "Authorization: Bearer $KEY"' if keys else ""
        body = json.dumps({"model": "pack", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32})
        curl = f"curl {socket}{where}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
        return f"packllm: listening on {where}, {note}; base URL for clients: {where}/v1\n{curl}"


def _hosts(host: str, uds: str | None, further: list[str]) -> tuple[str, ...]:
    """The names of a server on loopback; none where it listens elsewhere."""
    if uds or not (host in ("localhost", "::1") or host.startswith("127.")):
        return ()
    return ("localhost", "127.0.0.1", "[::1]", host, *(name.lower() for name in further))


def _keys(name: str | None) -> tuple[str, ...]:
    """The keys in an environment variable."""
    if name is None:
        return ()
    keys = tuple(key.strip() for key in os.environ.get(name, "").splitlines() if key.strip())
    if not keys:
        raise OptionError(f"--api-key-env {name}: the environment variable is not set, or is empty")
    return keys
