"""PackRerank: a packllm.Pack that reranks retrieved nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from packllm import Pack, PromptError
from packllm.decode.relevance import with_cosine


class PackRerank(BaseNodePostprocessor):
    """Several local language models that rerank nodes together, by the question's likelihood given each node (see
    packllm.Pack.relevance). The best come first; their score is log p(question | node) in nats.

    Raises:
        PromptError: when called with a blank or missing question, or a node without text.
        ContextOverflowError: when called with a node that is too long for a member.

    Examples:
        ```python
        engine = index.as_query_engine(llm=llm, node_postprocessors=[PackRerank(pack=llm.pack, top_n=3)])
        ```
    """

    pack: Pack = Field(exclude=True, repr=False)
    """The pack that rates the nodes."""
    top_n: int | None = Field(default=None, ge=1)
    """How many nodes to return; None: all."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the pack for each rating."""
    embed_model: BaseEmbedding | None = Field(default=None, exclude=True, repr=False)
    """An embedding model that rates the nodes, too: the score is then the sum of both ratings, each standardised over
    the nodes. Measured better than either alone (docs/rerank.md)."""

    @classmethod
    def class_name(cls) -> str:
        return "PackRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        question, texts = _question(query_bundle), _texts(nodes)
        scores = self.pack.relevance(question, texts, **self.options)
        if self.embed_model is not None and texts:
            embedded = self.embed_model.get_text_embedding_batch(texts)
            scores = with_cosine(scores, self.embed_model.get_query_embedding(question), embedded)
        return self._best(nodes, scores)

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        question, texts = _question(query_bundle), _texts(nodes)
        scores = await self.pack.arelevance(question, texts, **self.options)
        if self.embed_model is not None and texts:
            embedded = await self.embed_model.aget_text_embedding_batch(texts)
            scores = with_cosine(scores, await self.embed_model.aget_query_embedding(question), embedded)
        return self._best(nodes, scores)

    def _best(self, nodes: Sequence[NodeWithScore], scores: Sequence[float]) -> list[NodeWithScore]:
        order = sorted(range(len(nodes)), key=lambda at: -scores[at])[: self.top_n]
        return [NodeWithScore(node=nodes[at].node, score=scores[at]) for at in order]


def _question(bundle: QueryBundle | None) -> str:
    if bundle is None:
        raise PromptError("PackRerank rates nodes by a question; give query_bundle or query_str")
    return bundle.query_str


def _texts(nodes: Sequence[NodeWithScore]) -> list[str]:
    return [node.get_content() for node in nodes]
