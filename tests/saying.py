"""A member that says what a test wants it to, one byte a token."""

from __future__ import annotations

from typing import Any

import torch
from conftest import TEMPLATE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from packllm import Member, Pack


def spelling_tokenizer(template: str | None = TEMPLATE, special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token a byte, and control tokens: those of TEMPLATE and the `special` ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", *special, "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = template
    return fast


class Says(LlamaForCausalLM):
    """Writes `script` after any prompt, which it reads in one pass, then ends."""

    script: tuple[int, ...] = ()
    end = 0
    after = 0
    passes = 0

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        out = super().forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)
        self.passes += 1
        if not before:
            self.after = input_ids.shape[1]
        out.logits = torch.zeros_like(out.logits)
        for place in range(out.logits.shape[1]):
            at = before + place + 1 - self.after
            out.logits[:, place, self.script[at] if 0 <= at < len(self.script) else self.end] = 20.0
        return out


def saying(text: str, template: str | None = TEMPLATE, special: tuple[str, ...] = (), **options: Any) -> Pack:
    """A pack of one member that answers `text`; `special` are its control tokens, which the text may hold."""
    tokenizer = spelling_tokenizer(template, special)
    torch.manual_seed(0)
    model = Says(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8192,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    ).eval()
    model.end = tokenizer.eos_token_id
    member = Member(model, tokenizer, "m")
    model.script = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    member.engine.most = 2**31
    return Pack([member], **{"prefix_cache_mb": 0, "max_tokens": 400, **options})
