"""PackRerank: a packllm.Pack that reranks retrieved nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import Field
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from packllm import Pack, PromptError


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

    @classmethod
    def class_name(cls) -> str:
        return "PackRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return self._best(nodes, self.pack.relevance(_question(query_bundle), _texts(nodes), **self.options))

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return self._best(nodes, await self.pack.arelevance(_question(query_bundle), _texts(nodes), **self.options))

    def _best(self, nodes: Sequence[NodeWithScore], scores: Sequence[float]) -> list[NodeWithScore]:
        order = sorted(range(len(nodes)), key=lambda at: -scores[at])[: self.top_n]
        return [NodeWithScore(node=nodes[at].node, score=scores[at]) for at in order]


def _question(bundle: QueryBundle | None) -> str:
    if bundle is None:
        raise PromptError("PackRerank rates nodes by a question; give query_bundle or query_str")
    return bundle.query_str


def _texts(nodes: Sequence[NodeWithScore]) -> list[str]:
    return [node.get_content() for node in nodes]
