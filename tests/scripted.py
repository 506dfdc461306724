"""Members that say what a test wants: real Llamas that know nothing but which token follows which."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from packllm import Member

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama-3 splits text into words, contractions apart."""


def llama3_like(pieces: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level, with Llama-3's words and the given pieces beside the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = [piece.replace(" ", "Ġ").replace("\n", "Ċ") for piece in pieces]
    vocab = [("<|end|>", 0.0), *((piece, -10.0) for piece in alphabet), *((piece, -1.0) for piece in spelled)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def phi3_like(pieces: list[str]) -> PreTrainedTokenizerFast:
    """SentencePiece with byte fallback and no pre-tokenizer, as Phi-3's, with the given pieces beside ASCII."""
    letters = [chr(code) for code in range(33, 127)] + ["▁"]
    spelled = [piece.replace(" ", "▁") for piece in pieces if piece not in letters]
    plain = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    vocab = [*plain, *((letter, -10.0) for letter in letters), *((piece, -1.0) for piece in spelled)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    data = json.loads(tokenizer.to_str())
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def follows(
    tokenizer: PreTrainedTokenizerFast, table: Mapping[str, Mapping[str, float]], name: str, window: int = 512
) -> Member:
    """A member for whom `table[a][b]` is the probability of token b after token a, both given as text; "END" is
    its end. What is left of 1 is spread evenly over all other tokens."""
    size = len(tokenizer)
    width = size + -size % 8
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=8,
        max_position_embeddings=window,
        rms_norm_eps=1e-12,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    member = Member(model, tokenizer, name)
    ids = {bytes(token): i for i, token in enumerate(member.vocabulary.tokens)}

    def id_of(piece: str) -> int:
        return member.vocabulary.special["eos"] if piece == "END" else ids[piece.encode()]

    table_of = torch.full((size, size), -math.log(size))
    for before, following in table.items():
        rest = (1 - sum(following.values())) / (size - len(following))
        row = torch.full((size,), math.log(rest) if rest > 0 else -1e4)
        for piece, probability in following.items():
            row[id_of(piece)] = math.log(probability)
        table_of[id_of(before)] = row
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()  # neither attention nor the feed-forward part adds anything:
        layer.mlp.down_proj.weight.zero_()  # the last token's one-hot embedding reaches the head as it is
        model.model.embed_tokens.weight.copy_(torch.eye(size, width))
        model.model.norm.weight.fill_(width**-0.5)
        model.lm_head.weight.copy_(torch.nn.functional.pad(table_of.T, (0, width - size)))
    return member
