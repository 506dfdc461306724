"""packllm serve: the server on the command line."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import logging
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packllm import command_arguments
from packllm.command_arguments import Models, Others, WeightingName
from packllm.errors import ExtraError, OptionError

if TYPE_CHECKING:
    from packllm.serve.app import Server

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command()
def serve(
    model: Models = None,
    weighting: WeightingName = None,
    prior: Annotated[
        str | None, typer.Option(metavar="FILE", help="A prior over members, written by `packllm calibrate`.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 means all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 chooses a free one.")] = 8000,
    uds: Annotated[str | None, typer.Option(metavar="PATH", help="Listen on a unix socket instead.")] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Environment variable with the API keys, one per line."),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="A key itself; others on this machine may see it. May be repeated."),
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 32,
    max_queue: Annotated[int, typer.Option(min=0, help="Further requests that may wait; more get status 429.")] = 128,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Time limit of a request in seconds, including its wait.")
    ] = 600,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Size limit of a request body in MiB.")] = 4,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Another host name that requests may use when the server listens on loopback."
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Origin of web pages that may send requests, such as https://example.org."),
    ] = None,
    drain: Annotated[int, typer.Option(min=0, help="Seconds that running requests have to finish after SIGTERM.")] = 60,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Log the complete requests, including prompts.")
    ] = False,
    option: Others = None,
) -> None:
    """Serve the pack with OpenAI's API.

    The models are `pack`, and each member under its name. The server prints
    its address: open it in a browser to chat, or give it to a client of
    OpenAI's API as base URL, with /v1 at the end.

    Only this machine can connect, unless --host is given. After SIGTERM or
    Ctrl-C the server completes running answers; a second Ctrl-C ends it at once.

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
    options = command_arguments.request_options(weighting, option, {} if prior is None else {"prior": prior})
    settings = Settings(
        keys=(*_keys(api_key_env), *_not_blank(api_key or [])),
        running=max_running,
        queue=max_queue,
        timeout=timeout,
        body_bytes=max_body_mb * 2**20,
        hosts=_hosts(host, uds, allow_host or []),
        origins=tuple(cors or ()),
        log_prompts=log_prompts,
    )
    if uds is None:
        _check_address(host, port)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # A second Ctrl-C cancels the running requests: that is no error of theirs.
    logging.getLogger("uvicorn.error").addFilter(
        lambda record: not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
    )
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
    key_name = api_key_env if api_key_env and len(settings.keys) == 1 else "KEY"
    loading = _Loading(made.state.server, server, model, options, key_name)
    loading.start()
    try:
        server.run()
    except OSError as error:
        raise OptionError(f"cannot listen at {uds or f'{host}:{port}'}: {error.strerror or error}") from error
    loading.raise_failure()


class _Loading(threading.Thread):
    """Loads the models in a thread, while the server already answers /health, and prints the progress."""

    def __init__(
        self, ours: Server, uvicorn_server: Any, models: list[str] | None, options: dict[str, Any], key_name: str
    ) -> None:
        super().__init__(daemon=True, name="packllm-loading")
        self._ours, self._server, self._models, self._options = ours, uvicorn_server, models, options
        self._key_name = key_name
        self._failure: Exception | None = None

    def run(self) -> None:
        started = time.monotonic()
        what = ", ".join(self._models) if self._models else "the starter pack"
        typer.echo(f"packllm: loading {what}; /health is 503 until it is done", err=True)
        try:
            pack = command_arguments.load_pack(self._models, self._options)
            gc.collect()
            gc.freeze()  # no later collection goes through all that was loaded, which would stop all streams meanwhile
            gc.set_threshold(10_000, 10, 20)  # and an answer with many log-probabilities does not cause dozens
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
        """Raise the error that occurred while loading, if any."""
        if self._failure is not None:
            raise self._failure

    def _hello(self) -> str:
        """The server's address, who can reach it, and a curl command to try it."""
        config, keys = self._server.config, self._ours.settings.keys
        if config.uds:
            where, reach = "http://localhost", f"the unix socket {config.uds}"
            curl_option = f"--unix-socket {config.uds} "
        else:
            bound, port = self._server.servers[0].sockets[0].getsockname()[:2]
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bound, bound)
            where, curl_option = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}", ""
            if _is_loopback(bound):
                reach = f"{where}, for this machine only (--host changes this)"
            else:
                reach = f"{where}, for the network"
                reach += "" if keys else ": anyone who reaches it needs no key (--api-key-env changes this)"
        key = f' -H "Authorization: Bearer ${self._key_name}"' if keys else ""
        body = json.dumps({"model": "pack", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32})
        return (
            f"packllm: listening on {reach}\n"
            f"packllm: base URL for clients: {where}/v1{'' if config.uds else f'; page for browsers: {where}/'}\n"
            f"curl {curl_option}{where}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
        )


def _check_address(host: str, port: int) -> None:
    """Raise OptionError if the server could not listen there. Loading the models would be in vain."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        remedies = {
            errno.EADDRINUSE: "another program listens there; stop it, or choose another --port (0: a free one)",
            errno.EACCES: "choose a --port above 1023",
        }
        remedy = remedies.get(error.errno or 0, "--host must be an address of this machine (0.0.0.0: all of them)")
        reason = str(error.strerror or error).partition(" (while")[0]
        raise OptionError(f"cannot listen at {host}, port {port}: {reason}; {remedy}") from error


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _hosts(host: str, uds: str | None, further: list[str]) -> tuple[str, ...]:
    """Host names that requests may use if the server listens on loopback; empty if it listens elsewhere."""
    if uds or not _is_loopback(host):
        return ()
    return ("localhost", "127.0.0.1", "[::1]", host, *(name.lower() for name in further))


def _not_blank(keys: list[str]) -> list[str]:
    """The API keys of the command line. Raise OptionError if one is blank."""
    if any(not key.strip() for key in keys):
        raise OptionError("--api-key: the key is empty; give one, or leave out the option")
    return keys


def _keys(name: str | None) -> tuple[str, ...]:
    """The API keys in an environment variable."""
    if name is None:
        return ()
    keys = tuple(key.strip() for key in os.environ.get(name, "").splitlines() if key.strip())
    if not keys:
        raise OptionError(f"--api-key-env {name}: the environment variable is not set, or is empty")
    return keys
