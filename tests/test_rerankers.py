"""PackReranker and PackRerank: the frameworks' faces of Pack.relevance."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from conftest import TextPack

from packllm import ContextOverflowError, Pack, PromptError
from packllm.decode.relevance import with_cosine

QUESTION = "What is the capital of France?"
PASSAGES = [
    "A query planner chooses an index scan or a sequential scan from statistics of the table.",
    "The capital of France is Paris.",
    "The court shall order relief under chapter 7 unless the debtor objects.",
]


@pytest.fixture
def rated(members):
    pack = TextPack(members, weighting="uniform")
    scores = pack.relevance(QUESTION, PASSAGES)
    return pack, sorted(zip(scores, PASSAGES, strict=True), reverse=True)


def test_langchain_documents(rated, monkeypatch):
    langchain_packllm = pytest.importorskip("langchain_packllm")
    from langchain_core.documents import BaseDocumentCompressor, Document

    pack, best = rated
    documents = [Document(text, id=str(at), metadata={"source": at}) for at, text in enumerate(PASSAGES)]
    reranker = langchain_packllm.PackReranker(pack=pack, top_n=2)
    assert isinstance(reranker, BaseDocumentCompressor)
    for found in (
        reranker.compress_documents(documents, QUESTION),
        asyncio.run(reranker.acompress_documents(documents, QUESTION)),
    ):
        assert [one.page_content for one in found] == [text for _, text in best[:2]]
        assert [one.metadata["relevance_score"] for one in found] == pytest.approx([s for s, _ in best[:2]], abs=1e-3)
        assert [PASSAGES[one.metadata["source"]] for one in found] == [one.page_content for one in found]
        assert {one.id for one in found} < {"0", "1", "2"}
    assert documents[0].metadata == {"source": 0}  # the caller's stay as they are
    assert reranker.compress_documents([], QUESTION) == []
    assert len(langchain_packllm.PackReranker(pack=pack).compress_documents(documents, QUESTION)) == 3
    name = pack.members[2].name
    alone = langchain_packllm.PackReranker(pack=pack, options={"weighting": {name: 1.0}})
    scores = {
        one.page_content: one.metadata["relevance_score"] for one in alone.compress_documents(documents, QUESTION)
    }
    expected = pack.relevance(QUESTION, PASSAGES, weighting={name: 1.0})
    assert [scores[text] for text in PASSAGES] == pytest.approx(expected, abs=1e-3)
    with pytest.raises(PromptError, match=r"passages\[1\]"):
        reranker.compress_documents([documents[0], Document("")], QUESTION)
    with pytest.raises(PromptError, match="question="):
        reranker.compress_documents(documents, " ")
    with pytest.raises(ContextOverflowError, match=r"passages\[1\]"):
        reranker.compress_documents([documents[0], Document("7 " * 600)], QUESTION)
    with pytest.raises(ValueError, match="top_n"):
        langchain_packllm.PackReranker(pack=pack, top_n=0)


def test_llama_index_nodes(rated):
    pytest.importorskip("llama_index.core")
    from llama_index.core.schema import ImageNode, NodeWithScore, TextNode

    from llama_index.postprocessor.packllm import PackRerank

    pack, best = rated
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(at)), score=0.5) for at, text in enumerate(PASSAGES)]
    reranker = PackRerank(pack=pack, top_n=2)
    for found in (
        reranker.postprocess_nodes(nodes, query_str=QUESTION),
        asyncio.run(reranker.apostprocess_nodes(nodes, query_str=QUESTION)),
    ):
        assert [one.node.text for one in found] == [text for _, text in best[:2]]
        assert [one.score for one in found] == pytest.approx([score for score, _ in best[:2]], abs=1e-3)
    assert {node.score for node in nodes} == {0.5}
    assert reranker.postprocess_nodes([], query_str=QUESTION) == []
    assert len(PackRerank(pack=pack).postprocess_nodes(nodes, query_str=QUESTION)) == 3
    with pytest.raises(PromptError, match="query_str"):
        reranker.postprocess_nodes(nodes)
    with pytest.raises(PromptError, match=r"passages\[1\]"):
        reranker.postprocess_nodes([nodes[0], NodeWithScore(node=ImageNode(image="aGk="))], query_str=QUESTION)
    assert "pack" not in reranker.to_dict()


def embedding(text: str) -> list[float]:
    return [float(text.count(letter)) for letter in "aeiourt"]


def test_embeddings_rate_too(rated):
    pytest.importorskip("langchain_packllm")
    pytest.importorskip("llama_index.core")
    from langchain_core.documents import Document
    from langchain_core.embeddings import Embeddings
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.schema import NodeWithScore, TextNode

    from langchain_packllm import PackReranker
    from llama_index.postprocessor.packllm import PackRerank

    class Letters(Embeddings):
        def embed_documents(self, texts):
            return [embedding(text) for text in texts]

        def embed_query(self, text):
            return embedding(text)

    class LettersOfNodes(BaseEmbedding):
        def _get_query_embedding(self, query):
            return embedding(query)

        async def _aget_query_embedding(self, query):
            return embedding(query)

        def _get_text_embedding(self, text):
            return embedding(text)

    pack, best = rated
    ratings = {text: score for score, text in best}
    scores = with_cosine([ratings[p] for p in PASSAGES], embedding(QUESTION), [embedding(p) for p in PASSAGES])
    order = sorted(zip(scores, PASSAGES, strict=True), reverse=True)
    documents, reranker = [Document(text) for text in PASSAGES], PackReranker(pack=pack, embeddings=Letters())
    for told in (
        reranker.compress_documents(documents, QUESTION),
        asyncio.run(reranker.acompress_documents(documents, QUESTION)),
    ):
        assert [one.page_content for one in told] == [text for _, text in order]
        assert [one.metadata["relevance_score"] for one in told] == pytest.approx([s for s, _ in order], abs=1e-3)
    assert reranker.compress_documents([], QUESTION) == []
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in PASSAGES]
    postprocessor = PackRerank(pack=pack, embed_model=LettersOfNodes())
    for told in (
        postprocessor.postprocess_nodes(nodes, query_str=QUESTION),
        asyncio.run(postprocessor.apostprocess_nodes(nodes, query_str=QUESTION)),
    ):
        assert [one.node.text for one in told] == [text for _, text in order]
        assert [one.score for one in told] == pytest.approx([s for s, _ in order], abs=1e-3)
    assert postprocessor.postprocess_nodes([], query_str=QUESTION) == []


def test_the_documented_program_runs(members, monkeypatch, capsys):
    pytest.importorskip("langchain_packllm")
    page = (Path(__file__).parents[1] / "docs" / "rerank.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.setattr(Pack, "starter", classmethod(lambda cls: Pack(members)))
    exec(compile(program, "rerank.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 1
