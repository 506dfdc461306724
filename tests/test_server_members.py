"""Members on servers, on loopback: authors and judges beside token models, and all that can go wrong with them."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
import pickle
import threading
import warnings
from itertools import count

import pytest
import serving
from serving import CORPUS, Broken, Served, english
from test_gguf import write_gguf

import packllm
from packllm import AnswerTimeout, CancelledError, LoadError, MemberError, OptionError, Pack, PackError, VocabularyError
from packllm.decode.relevance import asked, asking
from packllm.engines.llama_cpp.native import VERSION, installed
from packllm.engines.server import http
from packllm.engines.server.address import Address
from packllm.engines.server.answers import aligned
from packllm.engines.server.member import Joint, connect

pytestmark = pytest.mark.enable_socket

QUESTION = "What is the capital of France?"
KEY = "sk-d0nt-t3ll-any0ne"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(http, "BACKOFF", 0.0)


@pytest.fixture(scope="module")
def minds(byte_tokenizer):
    """Two models of English that differ."""
    return english(byte_tokenizer, "near", CORPUS[1:]), english(byte_tokenizer, "far", CORPUS[:3])


@pytest.fixture
def serve(minds):
    """serve(): a server of the second mind."""
    servers = []

    def start(model: str = "tiny", author: bool = False) -> Served:
        server = Served(minds[1], model)
        if author:
            server.change = without_logprobs
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()


def without_logprobs(path, answer):
    """As a server answers that has none."""
    answer.pop("prompt_logprobs", None)
    for choice in answer.get("choices", ()):
        choice.pop("prompt_logprobs", None)
        choice.pop("logprobs", None)
    return answer


# Three kinds of member


def test_a_judge_is_what_the_same_model_is_here(serve, minds):
    near, far = minds
    mixed, local = Pack.load([near, serve().spec()], max_tokens=30), Pack.load([near, far], max_tokens=30)
    assert [member.kind for member in mixed.members] == ["token model", "judge"]
    for prompt in (QUESTION, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": CORPUS[3]}]):
        apart, whole = mixed.weigh(prompt, unit="byte"), local.weigh(prompt, unit="byte")
        assert apart.scored > 10
        assert apart.nll == pytest.approx(whole.nll, rel=1e-4)
        assert apart.values == pytest.approx(whole.values, abs=0.02)  # by words, and by tokens
    answer = mixed.generate(QUESTION)
    assert answer.decoding == answer.as_dict()["decoding"] == "cool"
    assert answer.text == local.generate(QUESTION, decoding="cool").text
    assert local.generate(QUESTION).decoding == "tokens"
    candidates = [" Paris.", " the lazy dog.", " small house"]
    expected = Pack.load([far]).score("The capital of France is", candidates)
    assert mixed.score("The capital of France is", candidates, weighting={"far": 1.0}) == pytest.approx(
        expected, rel=1e-4
    )
    both = {"near": 0.5, "far": 0.5}
    ranked = [pack.rerank("The capital of France is", candidates, weighting=both) for pack in (mixed, local)]
    assert [text for text, _ in ranked[0]] == [text for text, _ in ranked[1]]


def test_a_judge_of_texts_beyond_ascii(serve, minds):
    prompt = "Ça coûte 5 € à Zürich. 東京 is the capital. The capital of France is Paris. 🙂"
    mixed, local = Pack.load([serve().spec()]), Pack.load([minds[1]])
    for options in ({"chat_template": False}, {"score_on": "The capital of France"}):
        apart, whole = (pack.weigh(prompt, unit="byte", **options) for pack in (mixed, local))
        assert apart.nll == pytest.approx(whole.nll, rel=0.02)  # which byte a token stands for is not told


def test_an_author_writes_and_is_judged_by_the_others(serve, minds):
    server = serve(author=True)
    pack = Pack.load([minds[0], server.spec()], max_tokens=40, weighting="uniform")
    author = pack.members[1]
    assert author.kind == "author"
    assert "no usable log-probabilities" in author.why
    answer = pack.generate(QUESTION)
    assert answer.weights.values == (0.5, 0.5)
    assert answer.weights.nll[1] is None
    assert answer.decoding == "cool"
    # Judged by the local model alone, which likes its own words best: it is its answer.
    assert answer.text == Pack.load([minds[0]]).generate(QUESTION, decoding="cool").text
    bill = answer.usage.servers["far"]
    assert bill["requests"] == len([body for body in server.asked("/chat/completions") if body.get("stream")]) > 0
    assert bill["completion_tokens"] > 0
    assert json.dumps(answer.as_dict())
    best = pack.generate(QUESTION, decoding="cool+rerank")
    assert best.decoding == "cool+rerank"
    assert pack.score("The capital of France is", [" Paris."]) == Pack.load([minds[0]]).score(
        "The capital of France is", [" Paris."]
    )


def test_authors_alone(serve, minds):
    specs = [serve("one", author=True).spec("a"), serve("two", author=True).spec("b")]
    pack = Pack.load(specs, max_tokens=25)
    own = Pack.load([minds[1]], max_tokens=25)
    for decoding in ("auto", "cool", "cool+rerank"):
        answer = pack.generate(QUESTION, decoding=decoding)
        assert answer.text == own.generate(QUESTION, decoding="tokens").text
        assert answer.weights.values == (0.5, 0.5)
    assert (
        pack.generate("Once upon a", chat_template=False).text == own.generate("Once upon a", chat_template=False).text
    )
    assert list(pack.generate_batch([QUESTION, CORPUS[0]])[1].usage.servers) == ["a", "b"]
    assert pack.generate(QUESTION, weighting={"b": 1.0}).weights.values == (0.0, 1.0)
    with pytest.raises(OptionError, match="no member can score a text"):
        pack.score("The", [" end"])
    with pytest.raises(PackError, match="tokens cannot be counted"):
        pack.count_tokens("The end")


@pytest.mark.parametrize("decoding", ["tokens", "lazy", "mined"])
def test_what_needs_rows_refuses_a_server(serve, minds, decoding):
    pack = Pack.load([minds[0], serve().spec()])
    options = {"temperature": 1.0, "pool": "linear"} if decoding == "lazy" else {}
    with pytest.raises(VocabularyError, match=r"'far' is no token model but a judge.*'cool'"):
        pack.generate(QUESTION, decoding=decoding, **options)
    with pytest.raises(PackError, match=r"'exact' needs the logits.*'far'.*em"):
        pack.generate(QUESTION, weighting="exact")


def test_weights_of_members_without_judgement(serve, minds):
    pack = Pack.load([minds[0], serve().spec("judge"), serve(author=True).spec("author")])
    pair = Pack.load([minds[0], serve().spec("judge")])
    judged = pair.weigh(QUESTION)
    weights = pack.weigh(QUESTION)
    assert weights.values == pytest.approx((2 / 3 * judged.values[0], 2 / 3 * judged.values[1], 1 / 3))
    assert weights.nll == (*judged.nll, None)
    best = max(range(2), key=lambda k: -judged.nll[k])
    assert pack.weigh(QUESTION, weighting="top1").values == tuple(float(k == best) for k in range(3))
    assert pack.weigh(QUESTION, weighting="uniform").values == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    given = {"near": 0.2, "judge": 0.3, "author": 0.5}
    assert pack.weigh(QUESTION, weighting=given).values == (0.2, 0.3, 0.5)


def test_a_server_that_begins_anew_is_told_to_go_on(serve, minds):
    server = serve(author=True)
    server.knows_continue = False
    pack = Pack.load([minds[0], server.spec()], max_tokens=30, weighting={"near": 0.1, "far": 0.9})
    asked = [body["messages"] for body in server.asked("/chat/completions")]
    pack.generate(QUESTION, stop="relief")
    later = [body["messages"] for body in server.asked("/chat/completions")][len(asked) :]
    assert later[0] == [{"role": "user", "content": QUESTION}]
    assert {tuple(m["role"] for m in messages) for messages in later[1:]} <= {("user", "assistant", "user")}
    joint = Joint("The cat sat")
    assert [joint.push("The "), joint.push("cat sat"), joint.finish()] == ["", "", ""]
    joint = Joint("The cat sat")
    assert [joint.push("The cat"), joint.push(" sat on"), joint.push(" it")] == ["", " on", " it"]
    joint = Joint("The cat sat")
    assert joint.push("on a mat") == " on a mat"


def test_the_connection_is_dropped_when_the_pack_has_what_it_needs(serve, minds):
    server = serve(author=True)
    server.endless = True
    pack = Pack.load([minds[0], server.spec()], max_tokens=400, weighting={"far": 1.0})
    stream = pack.stream(QUESTION)
    next(stream)
    stream.close()
    assert server.dropped.wait(20)


# What servers get wrong


def shifted(path, answer):
    for choice in answer.get("choices", ()):
        if listed := choice.get("prompt_logprobs"):
            told = [next(iter(entry.values())) for entry in listed[1:]]
            moved = [told[0]["logprob"], *(one["logprob"] for one in told)]
            for one, logprob in zip(told, moved, strict=False):
                one["logprob"] = logprob
        if listed := (choice.get("logprobs") or {}).get("token_logprobs"):
            choice["logprobs"]["token_logprobs"] = (
                [None, None, *listed[1:-2], listed[-1]] if len(listed) > 3 else listed
            )
    answer.pop("prompt_logprobs", None)
    return answer


def answer_only(path, answer):
    answer = without_logprobs(path, {**answer, "choices": [dict(choice) for choice in answer.get("choices", ())]})
    for choice in answer["choices"]:
        if "text" in choice:
            choice["logprobs"] = {"tokens": [choice["text"]], "token_logprobs": [-0.5]}
    return answer


def made_up(path, answer):
    for choice in answer.get("choices", ()):
        for entry in choice.get("prompt_logprobs") or ():
            for one in (entry or {}).values():
                one["logprob"] = -1.0 - len(one["decoded_token"]) / 100
        choice.pop("logprobs", None)
    answer.pop("prompt_logprobs", None)
    return answer


def positive(path, answer):
    for choice in answer.get("choices", ()):
        for entry in choice.get("prompt_logprobs") or ():
            for one in (entry or {}).values():
                one["logprob"] = -one["logprob"]
        choice.pop("logprobs", None)
    answer.pop("prompt_logprobs", None)
    return answer


def too_few(path, answer):
    for choice in answer.get("choices", ()):
        if "prompt_logprobs" in choice:
            choice["prompt_logprobs"] = choice["prompt_logprobs"][:-3]
        choice.pop("logprobs", None)
    answer.pop("prompt_logprobs", None)
    return answer


@pytest.mark.parametrize("lie", [shifted, answer_only, made_up, positive, too_few, without_logprobs])
def test_a_server_that_lies_about_log_probabilities_is_an_author(serve, minds, lie, caplog):
    server = serve()
    server.change = lie
    with caplog.at_level(logging.INFO, "packllm"):
        pack = Pack.load([minds[0], server.spec()], max_tokens=5)
    member = pack.members[1]
    assert member.kind == "author"
    told = {
        shifted: "shifted",
        answer_only: "answer only",
        made_up: "",
        positive: "not log-probabilities",
        too_few: "for",
        without_logprobs: "returns none",
    }
    assert told[lie] in repr(member)
    assert repr(member) in caplog.text
    assert pack.generate(QUESTION).text


def test_echo_alone_makes_a_judge(serve, minds):
    server = serve()

    def no_vllm(path, answer):
        answer.pop("prompt_logprobs", None)
        for choice in answer.get("choices", ()):
            choice.pop("prompt_logprobs", None)
        return answer

    server.change = no_vllm
    pack = Pack.load([server.spec()])
    assert pack.members[0].kind == "judge"
    assert "echo" in repr(pack.members[0])
    text = CORPUS[0]
    own = Pack.load([minds[1]]).weigh(text, unit="byte", chat_template=False)
    assert pack.weigh(text, unit="byte", chat_template=False).nll == pytest.approx(own.nll, rel=1e-4)
    assert pack.weigh(text, unit="byte").nll[0] == pytest.approx(own.nll[0], rel=0.2)  # as plain lines, "User: ..."


def test_where_tokens_are_in_a_text():
    assert aligned(["The", " cat"], "The cat") == [(0, 3), (3, 7)]
    assert aligned([None, " cat"], "The cat") == [(0, 3), (3, 7)]
    assert aligned([None, "The", " cat"], "The cat") == [(0, 0), (0, 3), (3, 7)]
    assert aligned(["a", "�", "�", "b"], "a€b") == [(0, 1), (1, 2), (1, 2), (2, 3)]
    assert aligned(["a", "", "€", "b"], "a€b") == [(0, 1), (1, 2), (1, 2), (2, 3)]
    assert aligned(["The", " dog"], "The cat") is None
    assert aligned([".*", "+"], ".*+") == [(0, 2), (2, 3)]


# Failures that pass, and those that do not


def first(times, answer):
    """A fault of the first answers of streams."""
    left = count(times, -1)

    def fault(path, body):
        if body is None or not body.get("stream") or next(left) <= 0:
            return None
        if answer is Broken:
            raise Broken
        return answer

    return fault


PASSING = [
    (503, {}, "loading"),
    (500, {}, json.dumps({"error": {"message": "cuda"}})),
    (429, {"retry-after": "0"}, "{}"),
    (429, {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, "{}"),
    (200, {}, "<html>no JSON</html>"),
    (200, {"content-type": "text/event-stream"}, 'data: {"choices": [{"delta": {"content": "'),
    (200, {"content-type": "text/event-stream"}, 'data: {"error": {"message": "engine died"}}\n\n'),
    (200, {"content-type": "text/event-stream"}, ""),
    Broken,
]


@pytest.mark.parametrize("fault", PASSING, ids=str)
def test_a_failure_that_passes_does_not_show(serve, fault):
    server = serve(author=True)
    pack = Pack.load([server.spec()], max_tokens=20)
    whole = pack.generate(QUESTION).text
    server.fault = first(2, fault)
    assert pack.generate(QUESTION).text == whole
    server.fault = first(99, fault)
    with pytest.raises(MemberError, match=r"'far'.*failed after 5 attempts"):
        pack.generate(QUESTION)


def test_a_stream_that_breaks_goes_on_where_it_broke(serve):
    server = serve(author=True)
    pack = Pack.load([server.spec()], max_tokens=20)
    whole = pack.generate(QUESTION)
    for cuts in ({0: 3}, {0: 1, 1: 2, 2: 4}, {0: 0, 1: 0, 2: 5}):
        server.streams, server.cut = 0, cuts
        again = pack.generate(QUESTION)
        assert (again.text, again.finish_reason) == (whole.text, whole.finish_reason)
        assert again.usage.servers["far"]["requests"] == len(cuts) + 1
        assert again.usage.servers["far"]["unreported"] == len(cuts)


@pytest.mark.parametrize("usage", ["many", 3, [], {"prompt_tokens": "many", "completion_tokens": -1}])
def test_a_count_of_tokens_that_is_none(serve, minds, usage):
    server = serve()
    expected = Pack([minds[1]], max_tokens=8).generate(QUESTION).text
    server.change = lambda path, answer: {**answer, "usage": usage}
    pack = Pack.load([server.spec()], max_tokens=8)
    assert pack.generate(QUESTION).text == expected
    assert pack.score("The", [" end"])


def test_a_restart_in_the_middle(serve, minds):
    server = serve()
    pack = Pack.load([minds[0], server.spec()], max_tokens=30)
    whole = pack.generate(QUESTION).text
    left = count(8, -1)

    def fault(path, body):
        if 0 < next(left) <= 4:
            raise Broken

    server.fault = fault
    assert pack.generate(QUESTION).text == whole


def test_a_member_that_is_down_is_done_without(serve, minds):
    server = serve()
    pack = Pack.load([minds[0], server.spec()], max_tokens=20, on_member_error="drop")
    alone = Pack.load([minds[0]], max_tokens=20).generate(QUESTION, decoding="cool").text
    server.fault = lambda path, body: (500, {}, "{}")
    answer = pack.generate(QUESTION)
    assert (answer.text, answer.weights.values) == (alone, (1.0, 0.0))
    server.fault = first(99, (500, {}, "{}"))  # it judges, and fails when it writes
    assert pack.generate(QUESTION).weights.values == (1.0, 0.0)
    assert pack.score(QUESTION, [" Paris."], weighting="uniform")
    with pytest.raises(MemberError, match="far"):
        pack.generate(QUESTION, on_member_error="raise")


def test_what_no_repetition_mends_is_said_at_once(serve):
    server = serve(author=True)
    pack = Pack.load([server.spec()], max_tokens=20)
    for fault, said in (
        ((400, {}, json.dumps({"error": {"message": "context length exceeded"}})), "context length exceeded"),
        ((401, {}, "{}"), "check the API key"),
        ((429, {"retry-after": "86400"}, "{}"), "retry after 86400 seconds"),
    ):
        server.fault, asked = (lambda path, body, fault=fault: fault), len(server.log)
        with pytest.raises(MemberError, match=said):
            pack.generate(QUESTION)
        assert len(server.log) == asked + 1
    server.fault = lambda path, body: None
    server.change = lambda path, answer: {}
    with pytest.raises(LoadError, match="no choices"):
        Pack.load([server.spec()])


def test_a_refused_field_is_done_without(serve, caplog):
    server = serve(author=True)

    def fault(path, body):
        for name in ("stream_options", "seed"):
            if body and name in body:
                return 400, {}, json.dumps({"error": {"message": f"Unrecognized request argument supplied: {name}"}})
        return None

    server.fault = fault
    pack = Pack.load([server.spec()], max_tokens=10)
    assert pack.generate(QUESTION, temperature=0.5, seed=3).text
    assert "seed" in caplog.text


def test_a_server_that_hangs(serve, minds):
    server = serve(author=True)
    pack = Pack.load([minds[0], server.spec()], max_tokens=20, weighting="uniform")
    patient = Pack.load([server.spec(words="?timeout=0.05")], max_tokens=20)
    waiting, over = threading.Event(), threading.Event()

    def fault(path, body):
        waiting.set()
        over.wait(60)

    server.fault = fault
    with pytest.raises(AnswerTimeout):
        pack.generate(QUESTION, timeout=0.2)
    waiting.clear()
    cancel = threading.Event()
    threading.Thread(target=lambda: (waiting.wait(60), cancel.set()), daemon=True).start()
    with pytest.raises(CancelledError):
        pack.generate(QUESTION, cancel=cancel)
    with pytest.raises(MemberError, match="no answer in time"):
        patient.generate(QUESTION)
    over.set()


# Addresses and keys


def test_addresses():
    folder = "https://h/v1#m?key=K&tokenizer=./my%20folder"
    assert Address.of(Address.of(folder).spec) == Address.of(folder)
    assert Address.of(folder).tokenizer == "./my folder"
    whole = Address.of("law=https://host:1/v1/#org/model-7b?key=LAW_KEY&timeout=20")
    assert whole == Address("law", "https://host:1/v1", "org/model-7b", "LAW_KEY", None, 20.0)
    assert Address.of("https://host/v1?key=K#m").variable == "K"
    assert Address.of("http://127.0.0.1:8000/v1").model is None
    for spec, said in (
        ("https://me:pw@host/v1#m", "contains a user name or password"),
        (f"https://host/v1#m?key={KEY}", "name of an environment variable"),
        ("https://host/v1#m?kee=K", "did you mean 'key'"),
        ("https://host/v1#m?timeout=soon", "number of seconds"),
        ("https:///v1#m", "no host"),
        ("http://[::1/v1#m", "a host or a port that cannot be"),
        ("http://℀/v1#m", "a host or a port that cannot be"),
        ("http://h:port/v1#m", "a host or a port that cannot be"),
    ):
        with pytest.raises(LoadError, match=said) as caught:
            Address.of(spec)
        assert KEY not in str(caught.value)
        assert "pw" not in str(caught.value).replace("password", "")


def test_models_of_a_server(serve):
    server = serve()
    assert connect(server.url).model == "tiny"
    assert connect(server.spec("law")).name == "law"
    with pytest.raises(LoadError, match=r"no model 'tinny'; did you mean 'tiny'\? Its models: tiny"):
        Pack.load([f"{server.url}#tinny"])
    gone = serve()
    gone.close()
    with pytest.raises(LoadError, match="failed after 3 attempts"):
        Pack.load([gone.spec()])


def test_keys_are_told_to_nobody(serve, monkeypatch, caplog, tmp_path):
    server = serve(author=True)
    words = "?key=SOME_KEY"
    with pytest.raises(LoadError, match=r"'SOME_KEY'.*is not set"):
        Pack.load([server.spec(words=words)])
    monkeypatch.setenv("SOME_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    pack = Pack.load([server.spec(words=words)], max_tokens=5)
    assert pack.generate(QUESTION).text
    assert {headers["Authorization"] for _, _, headers in server.log} == {f"Bearer {KEY}"}
    server.fault = lambda path, body: (400, {}, json.dumps({"error": {"message": f"Incorrect API key {KEY} provided"}}))
    with pytest.raises(MemberError, match=r"Incorrect API key \*\*\* provided") as caught:
        pack.generate(QUESTION)
    server.fault = lambda path, body: None
    told, error = [], caught.value
    while error is not None:
        told += [str(error), repr(error), repr(error.__dict__)]
        error = error.__cause__ or error.__context__
    member = pack.members[0]
    told += [caplog.text, repr(pack), repr(member), str(vars(member)), str(vars(member.endpoint)), str(pack.recipe)]
    told += [pickle.dumps(pack).decode("latin-1"), pickle.dumps(member).decode("latin-1"), member.fingerprint]
    assert not [text for text in told if KEY in text]
    assert pickle.loads(pickle.dumps(member)).name == "far"
    assert copy.deepcopy(member).endpoint is member.endpoint


@pytest.mark.parametrize("key", [f"{KEY}\n{KEY}", f"Bearer {KEY}", f"{KEY}é", f"{KEY}\x00"])
def test_a_key_that_no_header_can_hold_is_not_quoted(serve, monkeypatch, key):
    monkeypatch.setattr(os, "environ", {**os.environ, "SOME_KEY": key})
    server = serve()
    with pytest.raises(LoadError, match="'SOME_KEY' holds no API key") as caught:
        Pack.load([server.spec(words="?key=SOME_KEY")])
    assert (caught.value.__cause__, caught.value.__context__, server.log) == (None, None, [])
    assert "d0nt" not in str(caught.value)


def test_a_key_that_goes_unencrypted_is_warned_of(monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    for url in ("http://host.example/v1", "http://127.0.0.1.example/v1", "HTTP://10.0.0.7:80/v1"):
        with pytest.warns(UserWarning, match=f"SOME_KEY is sent to {url.lower()} unencrypted") as caught:
            assert Address.of(f"{url}#m?key=SOME_KEY").key().get_secret_value() == KEY
        assert KEY not in str(caught[0].message)
    with warnings.catch_warnings(action="error"):
        for url in ("http://127.0.0.1/v1", "http://127.1.2.3/v1", "http://[::1]:8080/v1", "http://LocalHost/v1"):
            assert Address.of(f"{url}#m?key=SOME_KEY").key()
        assert Address.of("https://host.example/v1#m?key=SOME_KEY").key()


# Token by token, proved


@pytest.fixture(scope="module")
def tokenizer_folder(byte_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer.save_pretrained(folder)
    return f"?tokenizer={folder}"


@pytest.mark.parametrize("few", [False, True], ids=["20 tokens", "3 tokens"])
@pytest.mark.parametrize("pool", ["linear", "log"])
def test_greedy_tokens_are_proved(serve, minds, tokenizer_folder, pool, few):
    far = Pack.load([minds[0], serve().spec(words=tokenizer_folder)], max_tokens=25, pool=pool)
    here = Pack.load([minds[0], minds[1]], max_tokens=25, pool=pool)
    member = far.members[1]
    assert "returns its 20 most likely next tokens, and requested ids" in repr(member)
    if few:
        member.tops.count = 3
    rounds = tokens = at_once = 0
    for prompt, weights in itertools.product((QUESTION, CORPUS[0], "The old"), ((0.5, 0.5), (0.2, 0.8), (0.45, 0.55))):
        options = {"weighting": dict(zip(("near", "far"), weights, strict=True)), "chat_template": prompt != "The old"}
        proved, plain = far.generate(prompt, **options), here.generate(prompt, **options)
        assert (proved.text, proved.finish_reason, proved.decoding) == (plain.text, plain.finish_reason, "tokens")
        count = proved.usage.completion_tokens + (proved.finish_reason == "stop")
        assert proved.usage.completion_tokens == plain.usage.completion_tokens
        rounds, tokens, at_once = rounds + proved.usage.rounds, tokens + count, at_once + proved.usage.proved_at_once
        assert proved.as_dict()["usage"]["rounds"] == proved.usage.rounds >= count
    assert at_once <= tokens <= rounds
    print(f"{pool}, top {member.tops.count}: {rounds / tokens:.2f} rounds a token, {at_once / tokens:.0%} at once")


@pytest.mark.parametrize("pool", ["linear", "log"])
def test_this_project_s_own_server(byte_tokenizer, tokenizer_folder, pool):
    """A judge whose tokens are proved, as with vLLM; without its tokenizer, one whose words are."""
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    from test_serve_clients import on_loopback

    from packllm.serve.app import create_app

    near, far = (
        english(byte_tokenizer, name, CORPUS[a:b], apart=1e-3) for name, a, b in (("near", 1, 5), ("far", 0, 3))
    )
    here = Pack([near, far], max_tokens=20, pool=pool)
    with on_loopback(create_app(Pack([far], max_tokens=20))) as url:
        mixed = Pack.load([near, f"far={url}#pack{tokenizer_folder}"], max_tokens=20, pool=pool)
        assert mixed.members[1].kind == "judge"
        assert "its 20 most likely next tokens, and requested ids" in repr(mixed.members[1])
        assert mixed.weigh(QUESTION).values == pytest.approx(here.weigh(QUESTION).values, rel=1e-3)
        for weights in ((0.5, 0.5), (0.2, 0.8)):
            options = {"weighting": dict(zip(("near", "far"), weights, strict=True))}
            proved, plain = (pack.generate(QUESTION, **options) for pack in (mixed, here))
            assert (proved.text, proved.decoding) == (plain.text, "tokens")
        by_words = Pack.load([f"far={url}#pack"], max_tokens=20)
        assert by_words.members[0].kind == "judge"
        told, right = (pack.weigh(CORPUS[0], unit="byte", chat_template=False).nll for pack in (by_words, Pack([far])))
        assert told == pytest.approx(right, rel=1e-3)
        assert by_words.generate(QUESTION).text == Pack([far], max_tokens=20).generate(QUESTION).text


@pytest.mark.parametrize("engine", ["transformers", "llama.cpp"])
def test_a_gguf_file_beside_a_server_writes_what_one_engine_writes(serve, minds, tokenizer_folder, tmp_path, engine):
    """Token by token, and segment by segment."""
    if engine == "llama.cpp" and installed() != VERSION:
        pytest.skip(f"needs llama-cpp-python=={VERSION} (extra llama-cpp)")
    write_gguf(minds[0], tmp_path / "near.gguf")
    far = Pack.load([str(tmp_path / "near.gguf"), serve().spec(words=tokenizer_folder)], engine=engine, max_tokens=20)
    if engine == "llama.cpp":
        far.members[0].engine._context(None).kind = 0  # keys and values in 32 bits: numbers are equal
    here = Pack.load(list(minds), max_tokens=20)
    for decoding in ("tokens", "cool"):
        options = {"weighting": {"near": 0.5, "far": 0.5}, "decoding": decoding}
        proved, plain = (pack.generate(QUESTION, **options) for pack in (far, here))
        assert (proved.text, proved.decoding) == (plain.text, decoding)


def test_a_server_whose_tokenizer_is_known_is_judged_in_ids(serve, minds, tokenizer_folder):
    far = Pack.load([minds[0], serve().spec(words=tokenizer_folder)])
    here = Pack.load([minds[0], minds[1]])
    for prompt in ("Ça coûte 5 € à Zürich. 東京 🙂. The capital of France", CORPUS[2]):
        assert far.weigh(prompt).unit == "token"
        assert far.weigh(prompt).values == pytest.approx(here.weigh(prompt).values, rel=1e-4)
        assert far.weigh(prompt, score_on="The").nll == pytest.approx(here.weigh(prompt, score_on="The").nll, rel=1e-4)
    assert far.count_tokens(QUESTION) == here.count_tokens(QUESTION)
    one = Pack.load([serve().spec(words=tokenizer_folder)])
    assert one.tokenize(QUESTION) == here.tokenize(QUESTION)
    assert one.generate(QUESTION, max_tokens=9).text == Pack.load([minds[1]]).generate(QUESTION, max_tokens=9).text


def test_what_cannot_be_proved_is_written_in_segments(
    serve, minds, tokenizer_folder, byte_tokenizer, word_tokenizer, tmp_path
):
    pack = Pack.load([minds[0], serve().spec(words=tokenizer_folder)], max_tokens=8)
    assert pack.generate(QUESTION, temperature=0.7, seed=1).decoding == "cool"
    with pytest.raises(VocabularyError, match="tokens"):
        pack.generate(QUESTION, decoding="tokens", temperature=0.7)
    word_tokenizer.save_pretrained(tmp_path)
    other = connect(serve().spec(words=f"?tokenizer={tmp_path}"))
    assert other.tops is None
    assert "tokenizer= is not the server's" in repr(other) or "ids of the tokenizer" in repr(other)
    other = english(byte_tokenizer, "near", CORPUS[3:])
    pack = Pack.load([other, serve().spec(words=tokenizer_folder)], max_tokens=25, weighting="uniform")
    member = pack.members[1]
    member.tops.named, member.tops.count = False, 1
    with pytest.raises(MemberError, match=r"'far'.*too little to prove"):
        pack.generate(QUESTION)
    answer = pack.generate(QUESTION, on_member_error="drop")
    assert answer.weights.values == (1.0, 0.0)
    assert answer.text == Pack.load([other], max_tokens=25).generate(QUESTION).text


def test_a_server_that_tells_any_number_of_next_tokens_judges_short_texts(serve, minds, tokenizer_folder, monkeypatch):
    """As llama-server: log-probabilities of the answer alone, and ids beside them."""
    monkeypatch.setattr(serving, "MOST", 10**6)
    server = serve()

    def like_llama(path, answer):
        answer.pop("prompt_logprobs", None)
        for choice in answer.get("choices", ()):
            choice.pop("prompt_logprobs", None)
            told = choice.pop("logprobs", None)
            if told and "top_logprobs" in told:
                tops = [
                    {"id": int(t.partition(":")[2] or -1), "logprob": p} for t, p in told["top_logprobs"][-1].items()
                ]
                choice["logprobs"] = {"content": [{**max(tops, key=lambda one: one["logprob"]), "top_logprobs": tops}]}
        return answer

    server.change = like_llama
    far = Pack.load([minds[0], server.spec(words=tokenizer_folder)], max_tokens=20)
    here = Pack.load([minds[0], minds[1]], max_tokens=20)
    assert far.members[1].kind == "judge"
    assert "one token per request" in repr(far.members[1])
    assert far.weigh(QUESTION).nll == pytest.approx(here.weigh(QUESTION).nll, rel=1e-4)
    assert far.weigh(" ".join(CORPUS)).nll[1] is None
    assert far.score("The", [" capital of"]) == pytest.approx(here.score("The", [" capital of"]), rel=1e-4)
    for decoding in ("tokens", "cool"):
        assert far.generate(QUESTION, decoding=decoding).text == here.generate(QUESTION, decoding=decoding).text


def test_a_server_without_conversations_continues_texts(serve, minds):
    server = serve()
    server.fault = lambda path, body: (400, {}, json.dumps({"error": "no chat template"})) if "chat" in path else None
    pack = Pack.load([server.spec()], max_tokens=12)
    own = Pack.load([minds[1]], max_tokens=12)
    assert pack.generate("The capital").text == own.generate("The capital", chat_template=False).text
    assert pack.generate([{"role": "user", "content": QUESTION}]).text
    assert server.asked("/completions")[-1]["prompt"] == f"User: {QUESTION}\nAssistant:"


def test_a_server_that_dies_while_tokens_are_proved(serve, minds, tokenizer_folder):
    server = serve()
    pack = Pack.load([minds[0], server.spec(words=tokenizer_folder)], max_tokens=25, weighting="uniform")
    whole, left = pack.generate(QUESTION), count(0)
    server.fault = lambda path, body: (503, {}, "{}") if next(left) in (3, 4, 6) else None
    assert pack.generate(QUESTION).text == whole.text
    left = count(0)
    server.fault = lambda path, body: (503, {}, "{}") if next(left) > 8 else None
    with pytest.raises(MemberError, match=r"'far'.*503"):
        pack.generate(QUESTION)
    left = count(0)
    answer = pack.generate(QUESTION, on_member_error="drop")
    assert answer.weights.values == (1.0, 0.0)
    assert answer.finish_reason == "stop"


def test_langchain_counts_what_servers_were_asked_for(serve, minds):
    langchain = pytest.importorskip("langchain_packllm")
    messages = pytest.importorskip("langchain_core.messages")
    server = serve(author=True)
    pack = Pack.load([minds[0], server.spec()], max_tokens=8)
    asked = len(server.asked("/chat/completions"))
    answers = langchain.ChatPackLLM(pack=pack).generate(
        [[messages.HumanMessage(QUESTION)], [messages.HumanMessage(CORPUS[0])]]
    )
    text = langchain.PackLLM(pack=pack).generate([QUESTION, CORPUS[0]])
    assert answers.generations[0][0].text == pack.generate(QUESTION).text
    counted = text.llm_output["token_usage"]["servers"]["far"]["requests"]
    assert 1 < counted < len(server.asked("/chat/completions")) - asked


def test_memory_and_prior_of_a_pack_with_a_server(serve, minds):
    server = serve(author=True)
    (far,) = packllm.estimate([server.spec()]).members
    assert (far.member, far.weights, far.note) == ("far", 0, "it is on a server")
    pack = Pack.load([minds[0], server.spec()])
    assert pack.memory()[1] == ("far", 0, 0)
    assert pack.weigh(QUESTION, prior={"near": 0.7, "far": 0.3}).values == pytest.approx((0.7, 0.3))
    two = pack.generate_batch([QUESTION], n=2, temperature=1.0, seed=1, max_tokens=6)[0]
    assert [one.usage.servers["far"]["requests"] > 0 for one in two] == [True, True]


def test_passages_are_rated_and_explained_with_servers(serve, minds):
    passages = [CORPUS[0], CORPUS[2]]
    mixed, both = Pack.load([minds[0], serve().spec()], max_tokens=8), {"near": 0.5, "far": 0.5}
    chat = mixed.has_chat_template
    expected = [mixed.score(asking(one, chat), [asked(QUESTION, chat)], weighting=both)[0] for one in passages]
    assert mixed.relevance(QUESTION, passages, weighting=both) == pytest.approx(expected, rel=1e-4)
    prompt = " ".join([*passages, QUESTION])
    answer = mixed.generate(prompt, passages=passages, min_weight=0.0)
    told = answer.explanation
    assert told.unit == "word"
    assert "".join(token.text for token in told.tokens) == answer.text
    for one in told.passages:
        assert set(one.perplexity) == {"near", "far"}
        assert all(value > 1 for value in one.perplexity.values())
        assert sum(one.share.values()) == pytest.approx(1)
    author = Pack.load([minds[0], serve(author=True).spec()], weighting="uniform", max_tokens=8)
    (message,) = author.generate(prompt, explain=True).explanation.messages
    assert message.perplexity["far"] is None
    assert message.share == {"near": 1.0, "far": 0.0}
    alone = Pack.load([serve(author=True).spec()], weighting="uniform", max_tokens=8)
    assert alone.generate(prompt, explain=True).explanation.messages[0].share == {}
    with pytest.raises(OptionError, match="no member can score a text"):
        alone.relevance(QUESTION, passages)
