"""packllm serve on the command line, and the page in a browser."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from conftest import _config, byte_level_tokenizer
from pytest_socket import enable_socket
from served import CHAT, QUESTION, listening, socket_of
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from packllm import Pack
from packllm.cli import app as cli
from packllm.serve.app import _PAGE_POLICY, create_app
from packllm.serve.command import _Loading


def test_it_loads_says_how_to_ask_answers_and_ends_when_told(tmp_path):
    tokenizer, folder = byte_level_tokenizer(), tmp_path / "tiny"
    AutoModelForCausalLM.from_config(_config("llama", len(tokenizer) + 24)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    command = [sys.executable, "-c", "from packllm.cli import app; app()", "serve", "-m", str(folder)]
    where = socket_of(tmp_path)
    with subprocess.Popen(
        [*command, "--uds", where, "--option", "max_tokens=3", "--api-key", "secret"], stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None
        told = []
        for line in server.stderr:
            told.append(line)
            if line.startswith("curl"):
                break
        with httpx.Client(transport=httpx.HTTPTransport(uds=where), base_url="http://localhost", timeout=60) as http:
            assert http.post(CHAT, json={"messages": QUESTION}).status_code == 401
            http.headers["authorization"] = "Bearer secret"
            assert http.get("/health").json()["models"] == ["pack", "tiny"]
            answer = http.post(CHAT, json={"messages": QUESTION, "model": "tiny"}).json()
        server.send_signal(signal.SIGTERM)
        rest = server.stderr.read()
    assert answer["usage"]["completion_tokens"] in range(4)
    assert told[0].startswith("packllm: loading")
    assert re.search(r"ready after [\d.]+ s; models: pack, tiny", "".join(told))
    assert f"--unix-socket {where} " in told[-1]
    assert "capital of France" not in rest
    assert server.returncode == -signal.SIGTERM


def test_what_it_cannot_do_it_says(tmp_path):
    result = CliRunner().invoke(cli, ["serve", "--api-key-env", "NO_SUCH_VARIABLE"])
    assert result.exit_code == 2
    assert "NO_SUCH_VARIABLE" in result.stderr
    result = CliRunner().invoke(cli, ["serve", "-o", "temprature=1", "--uds", socket_of(tmp_path)])
    assert result.exit_code == 2
    assert "did you mean 'temperature'" in result.stderr


@pytest.mark.enable_socket
def test_a_port_in_use_is_told_before_anything_loads():
    enable_socket()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(cli, ["serve", "-m", "/no/such/model", "--port", str(port)])
    assert result.exit_code == 2
    assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in result.stderr
    assert "choose another --port" in result.stderr
    assert "loading" not in result.stderr


@pytest.mark.parametrize(
    ("bound", "keys", "expected"),
    [
        (("127.0.0.1", 1), (), "listening on http://127.0.0.1:1, for this machine only (--host changes this)"),
        (("::1", 1, 0, 0), (), "listening on http://[::1]:1, for this machine only (--host changes this)"),
        (("0.0.0.0", 1), (), "listening on http://127.0.0.1:1, for the network: anyone who reaches it needs no key"),
        (("::", 1, 0, 0), ("a",), "listening on http://[::1]:1, for the network\n"),
        (("10.0.0.1", 1), ("a",), "listening on http://10.0.0.1:1, for the network\n"),
        (None, ("a",), "listening on the unix socket /run/s\n"),
    ],
)
def test_it_says_who_can_reach_it(bound, keys, expected):
    listener = SimpleNamespace(sockets=[SimpleNamespace(getsockname=lambda: bound)])
    server = SimpleNamespace(config=SimpleNamespace(uds=None if bound else "/run/s"), servers=[listener])
    ours = SimpleNamespace(settings=SimpleNamespace(keys=keys))
    said = _Loading(ours, server, None, {}, "PACK_KEY")._hello()
    assert expected in said
    assert ('-H "Authorization: Bearer $PACK_KEY"' in said) is bool(keys)
    assert shlex.split(said.splitlines()[-1])[0] == "curl"


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no browser")
    enable_socket()
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.enable_socket
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(make_member, browser, width):
    """An answer streams, bars move, tokens are shaded, nothing is fetched from elsewhere."""
    pack = Pack([make_member("llama", 0, name="general"), make_member("gpt2", 1, name="law")], max_tokens=20)
    with listening(create_app(pack), host="127.0.0.1", port=0) as server:
        port = server.servers[0].sockets[0].getsockname()[1]
        page = browser.new_page(viewport={"width": width, "height": 800})
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#model option >> nth=2", state="attached")
        page.fill("#question", QUESTION[0]["content"])
        page.keyboard.press("Enter")
        page.wait_for_selector("#send:text('Stop')")
        page.wait_for_selector("#send:text('Send')", timeout=60000)
        text = page.locator(".assistant").evaluate("turn => turn.textContent")
        shaded = page.locator(".assistant .token").evaluate_all("all => all.map(one => one.textContent).join('')")
        bars = page.locator(".bar i").evaluate_all("all => all.map(one => parseFloat(one.style.width))")
        across = page.evaluate("() => document.documentElement.scrollWidth")
    expected = pack.generate(QUESTION)
    assert text == expected.text
    assert shaded == text
    assert bars == pytest.approx([100 * value for value in expected.weights.values], abs=0.1)
    assert across <= width
    assert errors == []
    assert all(url.startswith((f"http://127.0.0.1:{port}/", "data:")) for url in asked)


SCRIPT = "<img src=x onerror='hit = 1'><script>hit = 2</script>"


def answer_of(text: str, reason: str | None, names: list[str]) -> str:
    """The events of a streamed answer of one token, with equal weights."""
    weights = {"names": names, "weights": [1 / len(names)] * len(names), "note": SCRIPT}
    token = {"token": text, "bytes": list(text.encode()), "members": dict.fromkeys(names, -0.1)}
    deltas: list[tuple[dict[str, Any], Any, Any]] = [({"content": text}, {"content": [token]}, None)]
    if reason is not None:
        deltas.append(({}, None, reason))
    choices = [{"delta": delta, "logprobs": told, "finish_reason": why} for delta, told, why in deltas]
    return "".join(
        f"data: {json.dumps({'choices': [choice], 'packllm': {'weights': {'now': weights}}})}\n\n" for choice in choices
    )


@pytest.mark.enable_socket
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_whatever_comes(browser, scheme):
    """Markup is inert; twelve members, long words and right-to-left text fit; errors, Stop and New do as they say."""
    names = [SCRIPT, "long-" * 30, *map(str, range(10))]
    long, hebrew = "Donaudampfschiff" * 30, "\u05e9\u05dc\u05d5\u05dd, 3.14"
    busy = {"error": {"message": "the server is busy"}}
    answers: list[Any] = [
        *(answer_of(text, "stop", names) for text in (SCRIPT, hebrew)),
        answer_of(long, "length", names),
        answer_of("half", None, names),
        busy,
    ]
    state = {"loading": True}

    def serve(route: Any) -> None:
        path = route.request.url.removeprefix("http://packllm.test")
        if path == "/":
            html = (files("packllm.serve") / "page.html").read_text()
            route.fulfill(body=html, content_type="text/html", headers={"content-security-policy": _PAGE_POLICY})
        elif path == "/v1/models" and state.pop("loading", False):
            route.fulfill(status=503, json={"error": {"message": "still being loaded"}})
        elif path == "/v1/models" and route.request.headers.get("authorization") != "Bearer s3":
            route.fulfill(status=401, json={"error": {"message": "send a key"}})
        elif path == "/v1/models":
            route.fulfill(json={"data": [{"id": name, "packllm": {"members": names}} for name in ["pack", *names]]})
        elif path == "/v1/chat/completions":
            answer = answers.pop(0) if answers else None
            if isinstance(answer, dict):
                route.fulfill(status=429, json=answer)
            elif answer is not None:
                route.fulfill(body=answer, content_type="text/event-stream")  # else the answer never begins
        else:
            raise AssertionError(f"the page fetches {path}")

    page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme, reduced_motion="reduce")
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.route("**/*", serve)
    page.goto("http://packllm.test/")
    page.wait_for_selector("#more[open]")  # the page asked again after 503, and wants a key now
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("s3")
    page.keyboard.press("Tab")
    page.wait_for_selector("#model option >> nth=12", state="attached")
    for question in ("one", "two", "three", "four", "five"):
        page.fill("#question", question)
        page.keyboard.press("Enter")
        page.wait_for_selector("#send:text('Send')")
    turns = page.locator(".turn").evaluate_all("all => all.map(turn => [turn.className, turn.textContent])")
    assert [text for kind, text in turns if kind == "turn assistant"] == [SCRIPT, hebrew, long, "half"]
    assert [text for kind, text in turns if kind == "turn dim"] == ["The answer reached its length limit."]
    assert [text for kind, text in turns if kind == "turn error"] == [
        "The connection to the server was lost.",
        "the server is busy",
    ]
    assert page.input_value("#question") == "five"  # ready to be sent again
    assert page.evaluate("[typeof hit, document.images.length, document.scripts.length]") == ["undefined", 0, 1]
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator(".bar").count() == 12
    assert (
        len(set(page.locator(".bar i").evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")))
        == 12
    )
    assert page.locator(".bar i").first.evaluate("bar => getComputedStyle(bar).transitionDuration") == "0s"

    def ask(question: str) -> list[str]:
        """What the server is sent; it does not answer."""
        page.fill("#question", question)
        with page.expect_request("**/completions") as sent:
            page.keyboard.press("Enter")
        page.wait_for_selector("#send:text('Stop')")
        return [message["content"] for message in sent.value.post_data_json["messages"]]

    assert ask("five") == ["one", SCRIPT, "two", hebrew, "three", long, "five"]
    page.fill("#question", "typed meanwhile")
    page.keyboard.press("Enter")
    assert page.inner_text("#send") == "Stop"
    page.fill("#question", "")
    page.click("#send")  # with an empty question
    page.wait_for_selector(".turn.dim:text('Stopped.')")
    assert ask("six")[-3:] == ["five", "(stopped)", "six"]
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:text('Send')")
    ask("seven")
    page.click("#new")
    page.wait_for_selector("#send:text('Send')")
    assert page.locator(".turn").count() == 0
    assert ask("eight") == ["eight"]
    page.close()
    assert errors == []
