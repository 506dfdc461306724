"""Members on a real llama-server, which the package xllamacpp carries: a process of its own, on loopback."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from serving import CORPUS, english
from test_gguf import write_gguf

from packllm import LoadError, Member, MemberError, Pack, starter
from packllm.engines.base import Read
from packllm.engines.llama_cpp.native import VERSION, installed
from packllm.engines.load import Loader
from packllm.engines.server import http

if importlib.util.find_spec("xllamacpp") is None:
    pytest.skip("needs xllamacpp, whose wheel has llama-server", allow_module_level=True)

pytestmark = pytest.mark.enable_socket

QUESTION = "What is the capital of France?"
PROGRAM = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.n_parallel = sys.argv[1], int(sys.argv[2]), 2048, 2
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.warmup, params.verbosity = False, -1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()  # it ends with the test
"""


class LlamaServer:
    """A llama-server of a file; `url` is up to /v1."""

    def __init__(self, path: Path | str) -> None:
        self._path, self.url = path, ""
        self.start()

    def start(self) -> None:
        """Also again, at the same address."""
        port = self.url.rpartition(":")[2].removesuffix("/v1") or "0"
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self._path), port],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = f"{self.process.stdout.readline().strip()}/v1"
        assert self.url.startswith("http://127.0.0.1:"), self.url

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[Path | str], LlamaServer]]:
    servers: list[LlamaServer] = []

    def start(path: Path | str) -> LlamaServer:
        servers.append(LlamaServer(path))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(http, "BACKOFF", 0.0)


@pytest.fixture(scope="module")
def minds(byte_tokenizer) -> tuple[Member, Member]:
    """Two models of English that differ, in torch, without ties, which would fall by rounding."""
    return english(byte_tokenizer, "near", CORPUS[1:], apart=1e-3), english(
        byte_tokenizer, "far", CORPUS[:3], apart=1e-3
    )


@pytest.fixture(scope="module")
def tiny(run, minds, tmp_path_factory) -> tuple[LlamaServer, str]:
    """A server of the second one in float32, and its spec with the file's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    write_gguf(minds[1], folder / "far.gguf")
    server = run(folder / "far.gguf")
    return server, f"far={server.url}?tokenizer={folder / 'far.gguf'}"


# Equal numbers: the answers of a pack whose members all run here


@pytest.mark.parametrize("pool", ["linear", "log"])
def test_proved_tokens_are_those_of_a_local_pack(tiny, minds, pool):
    far, here = Pack.load([minds[0], tiny[1]], max_tokens=20, pool=pool), Pack(minds, max_tokens=20, pool=pool)
    assert "its 20 most likely next tokens, and any number of them" in repr(far.members[1])
    texts = []
    for weights in ((0.5, 0.5), (0.2, 0.8), (0.45, 0.55)):
        weighting = dict(zip(("near", "far"), weights, strict=True))
        proved, plain = (pack.generate(QUESTION, weighting=weighting) for pack in (far, here))
        assert (proved.text, proved.finish_reason, proved.decoding) == (plain.text, plain.finish_reason, "tokens")
        assert proved.usage.rounds >= proved.usage.completion_tokens == plain.usage.completion_tokens
        texts.append(plain.text)
    assert all(texts)


def test_short_texts_are_judged_token_by_token(tiny, minds):
    far, here = Pack.load([minds[0], tiny[1]], max_tokens=20), Pack(minds, max_tokens=20)
    assert far.members[1].kind == "judge"
    assert far.weigh(QUESTION).nll == pytest.approx(here.weigh(QUESTION).nll, rel=1e-3)
    assert far.weigh(" ".join(CORPUS)).nll[1] is None  # longer than it pays
    candidates = [" capital of", " dog"]
    assert far.score("The", candidates) == pytest.approx(here.score("The", candidates), rel=1e-3)
    answer = far.generate(QUESTION, decoding="cool")
    assert answer.text == here.generate(QUESTION, decoding="cool").text


def test_an_author_is_judged_by_a_local_member(tiny, minds):
    pack = Pack.load([minds[0], f"far={tiny[0].url}"], max_tokens=20)
    assert pack.members[1].kind == "author"
    assert "those of the answer only" in repr(pack.members[1])
    alone = pack.generate(QUESTION, weighting={"far": 1.0})
    assert alone.text == Pack([minds[1]], max_tokens=20).generate(QUESTION).text
    fused = pack.generate(QUESTION)
    assert fused.weights.nll[1] is None
    assert fused.usage.servers["far"]["requests"] > 0
    assert fused.text == Pack([minds[0]], max_tokens=20).generate(QUESTION, decoding="cool").text


def test_a_restart_while_tokens_are_proved(tiny, minds):
    server, spec = tiny
    pack = Pack.load([minds[0], spec], max_tokens=20, weighting={"near": 0.45, "far": 0.55})
    whole, text = pack.generate(QUESTION), ""
    for at, chunk in enumerate(pack.stream(QUESTION)):
        text += chunk.text
        if at == 2:
            server.kill()
            server.start()
    assert text == whole.text
    assert whole.usage.completion_tokens > 6
    with closing(pack.stream(QUESTION)) as stream:
        next(stream)
        server.kill()
        with pytest.raises(MemberError, match=r"'far'.*failed after 5 attempts"):
            list(stream)
    dropped = pack.generate(QUESTION, on_member_error="drop")
    server.start()
    assert dropped.weights.values == (1.0, 0.0)
    assert pack.generate(QUESTION).text == whole.text


def test_names_of_models_and_servers_that_are_gone(run, minds, tmp_path):
    write_gguf(minds[1], tmp_path / "far.gguf")
    server = run(tmp_path / "far.gguf")
    with pytest.raises(LoadError, match=r"no model 'fra\.gguf'.*Its models: .*far\.gguf"):
        Pack.load([f"{server.url}#fra.gguf"])
    server.kill()
    with pytest.raises(LoadError, match=r"127\.0\.0\.1.*failed after 3 attempts"):
        Pack.load([server.url])


# The starter's model, whose four bits round differently in another build and order of sums


@pytest.fixture(scope="module")
def smol(run) -> tuple[LlamaServer, list[Member]]:
    """A server of the general model, and that model and its medicine expert here, in the same engine."""
    if installed() != VERSION:
        pytest.skip(f"needs llama-cpp-python=={VERSION} (extra llama-cpp)")
    if starter.base_file() is None:
        pytest.skip(starter.WEIGHTS)
    return run(starter.base_file()), Loader(engine="llama.cpp").members(starter.specs("llama.cpp")[:2])


@pytest.mark.real
@pytest.mark.parametrize("pool", ["linear", "log"])
def test_the_starter_beside_a_server(smol, pool):
    """The same text, up to a token where the two best are as near as rounding moves them."""
    server, (general, medicine) = smol
    far = Pack.load([medicine, f"general={server.url}?tokenizer={starter.base_file()}"], max_tokens=16, pool=pool)
    here = Pack([medicine, general], max_tokens=16, pool=pool)
    agreed = 0
    for prompt in (QUESTION, "Name three symptoms of diabetes."):
        options = {"weighting": {"medicine": 0.5, "general": 0.5}}
        apart, whole = (pack.generate(prompt, **options) for pack in (far, here))
        assert apart.decoding == "tokens"
        assert apart.usage.proved_at_once >= apart.usage.completion_tokens - 1
        ids = [general.encoder.continuation(answer.text) for answer in (apart, whole)]
        same = next((i for i, pair in enumerate(zip(*ids, strict=False)) if pair[0] != pair[1]), min(map(len, ids)))
        agreed += same
        if apart.text != whole.text:
            assert abs(gap(here, prompt, ids, same, pool)) < 0.3
    assert agreed > 10
    assert far.weigh(QUESTION).nll == pytest.approx(here.weigh(QUESTION).nll, abs=0.1)


def gap(pack: Pack, prompt: str, answers: list[list[int]], at: int, pool: str) -> float:
    """How far two answers' tokens at a place are apart in the pool of two equal members, in nats."""
    rows = []
    for member in pack.members:
        ids = [*member.encoder.encode([{"role": "user", "content": prompt}]).ids, *answers[1][:at]]
        with closing(member.open()) as sequence:
            rows.append(member.engine.read([Read(sequence, ids, "last")])[0][-1].double())
    fused = (rows[0] + rows[1]) / 2 if pool == "log" else (rows[0].exp() + rows[1].exp()).log()
    end = max(member.end_ids)
    first, second = (float(fused[ids[at] if at < len(ids) else end]) for ids in answers)
    return second - first


@pytest.mark.real
def test_the_starter_on_a_server_that_dies_and_comes_back(smol):
    server, (_, medicine) = smol
    weighting = {"medicine": 0.0, "general": 1.0}
    pack = Pack.load([medicine, f"general={server.url}"], max_tokens=100, weighting=weighting, min_weight=0)
    prompt = "Explain in detail why the sky is blue."
    answer, kills = "", 0
    stream = pack.stream(prompt)
    for chunk in stream:
        answer += chunk.text
        if kills == 0 and answer:
            server.kill()
            server.start()
            kills += 1
        usage = chunk.usage or None
    assert usage.servers["general"]["unreported"] >= 1
    assert usage.completion_tokens > 60
    with closing(pack.stream(prompt)) as stream:
        next(stream)
        server.kill()
        with pytest.raises(MemberError, match=r"'general'.*failed after 5 attempts"):
            list(stream)
    server.start()
