"""PackReranker: a packllm.Pack that reranks retrieved documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.embeddings import Embeddings
from pydantic import ConfigDict, Field

import packllm
from langchain_packllm.errors import typed
from packllm.decode.relevance import with_cosine


class PackReranker(BaseDocumentCompressor):
    """Several local language models that rerank documents together, by the question's likelihood given each document
    (see packllm.Pack.relevance).

    The best documents come first, each with its rating in ``metadata["relevance_score"]``: log p(question | document)
    in nats. For ``ContextualCompressionRetriever(base_compressor=PackReranker(pack=pack), base_retriever=...)``.

    Raises:
        PromptError: when called with a blank question or a document without text.
        ContextOverflowError: when called with a document that is too long for a member.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    pack: packllm.Pack = Field(exclude=True, repr=False)
    """The pack that rates the documents."""
    top_n: int | None = Field(default=None, ge=1)
    """How many documents to return; None: all."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the pack for each rating."""
    embeddings: Embeddings | None = Field(default=None, exclude=True, repr=False)
    """Embeddings that rate the documents, too: the score is then the sum of both ratings, each standardised over the
    documents. Measured better than either alone (docs/rerank.md)."""

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """The top_n documents, the best first; the earlier one among equals."""
        texts = [one.page_content for one in documents]
        with typed():
            scores = self.pack.relevance(query, texts, **self.options)
        if self.embeddings is not None and texts:
            embedded = self.embeddings.embed_documents(texts)
            scores = with_cosine(scores, self.embeddings.embed_query(query), embedded)
        return self._best(documents, scores)

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """As compress_documents, without blocking the event loop."""
        texts = [one.page_content for one in documents]
        with typed():
            scores = await self.pack.arelevance(query, texts, **self.options)
        if self.embeddings is not None and texts:
            embedded = await self.embeddings.aembed_documents(texts)
            scores = with_cosine(scores, await self.embeddings.aembed_query(query), embedded)
        return self._best(documents, scores)

    def _best(self, documents: Sequence[Document], scores: Sequence[float]) -> list[Document]:
        order = sorted(range(len(documents)), key=lambda at: -scores[at])[: self.top_n]
        return [
            documents[at].model_copy(update={"metadata": {**documents[at].metadata, "relevance_score": scores[at]}})
            for at in order
        ]
