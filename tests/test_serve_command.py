"""packllm serve on the command line, and the page in a browser."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys

import httpx
import pytest
from conftest import _config, byte_level_tokenizer
from pytest_socket import enable_socket
from served import CHAT, QUESTION, listening, socket_of
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from packllm import Pack
from packllm.cli import app as cli
from packllm.serve.app import create_app


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
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(make_member, width):
    """An answer streams, bars move, tokens are shaded, nothing is fetched from elsewhere."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no browser")
    enable_socket()
    pack = Pack([make_member("llama", 0, name="general"), make_member("gpt2", 1, name="law")], max_tokens=20)
    with listening(create_app(pack), host="127.0.0.1", port=0) as server, playwright.sync_playwright() as started:
        port = server.servers[0].sockets[0].getsockname()[1]
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
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
        browser.close()
    expected = pack.generate(QUESTION)
    assert text == expected.text
    assert shaded == text
    assert bars == pytest.approx([100 * value for value in expected.weights.values], abs=0.1)
    assert across <= width
    assert errors == []
    assert all(url.startswith((f"http://127.0.0.1:{port}/", "data:")) for url in asked)
