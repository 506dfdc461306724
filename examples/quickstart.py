"""Weigh three prompts with the starter pack, then let it answer one: python examples/quickstart.py"""

from show import console, show_question, show_weights

from packllm import Pack

PROMPTS = (
    "Asthma is a chronic disease in which the airways swell. Symptoms include wheezing and shortness of breath.",
    "Any person who knowingly violates this section shall be fined under this title, imprisoned, or both.",
    "CREATE INDEX builds an index on the specified columns of a table to enhance query performance.",
)

with Pack.starter() as pack:
    for prompt in PROMPTS:
        show_question(prompt)
        show_weights(pack.weigh(prompt).as_dict())

    question = "What are the symptoms of asthma?"
    show_question(question)
    for chunk in pack.stream([{"role": "user", "content": question}], max_tokens=80):
        console.print(chunk.text, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
