"""Packs of one member that wants to answer a given text, whatever it has written so far."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from packllm import Generation, Member, Pack

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def one_token_a_byte() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=TEMPLATE)


class _Says(LlamaForCausalLM):
    """Wants the tokens of `script` after a prompt of `after` tokens, and then the end."""

    script: tuple[int, ...] = ()
    after, end = 10**9, 0

    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        out = super().forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)
        out.logits = torch.zeros_like(out.logits)
        for j in range(out.logits.shape[1]):
            at = before + j + 1 - self.after
            out.logits[:, j, self.script[at] if 0 <= at < len(self.script) else self.end] = 20.0
        return out


class Wanting:
    """A pack whose member wants to answer a text; `ask` as Pack.generate, `llm` for what adapters take.

    The prompt is always the same, so that where the answer begins is known before.
    """

    PROMPT = "Say it."

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
        self.tokenizer = tokenizer or one_token_a_byte()
        config = LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        torch.manual_seed(0)
        self.model = _Says(config).eval()
        self.model.end = self.tokenizer.eos_token_id
        self.pack = Pack([Member(self.model, self.tokenizer, "m")], prefix_cache_mb=0, max_tokens=400)

    def ask(self, text: str, **options: Any) -> Generation:
        messages = [{"role": "user", "content": self.PROMPT}]
        self.model.after = 10**9
        self.want(text, next(iter(self.pack.stream(messages, **{**options, "max_tokens": 1}))).usage.prompt_tokens)
        return self.pack.generate(messages, **options)

    def want(self, text: str, after: int) -> None:
        self.model.script = tuple(self.tokenizer(text, add_special_tokens=False).input_ids)
        self.model.after = after
