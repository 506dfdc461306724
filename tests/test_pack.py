from __future__ import annotations


def test_smoke(pack):
    generation = pack.generate("The capital of France is")
    assert generation.usage.completion_tokens == 12
    assert "".join(chunk.text for chunk in pack.stream("The capital of France is")) == generation.text
