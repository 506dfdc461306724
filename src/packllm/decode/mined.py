"""Token-by-token fusion across vocabularies through MinED mappings (PackLLM §3.4).

The pack speaks the token ids of one member, the reference: the one that predicts the prompt best, by its own
tokenizer. Every other member reads the reference's ids mapped to the nearest of its own, and its logits are
gathered back: the reference token r gets the logit of the member's token nearest to r (Eq. 1 then fuses as usual).

What this does to text, and why it is never the default:
- The mapping is many-to-one. What a member reads is not the text but a near miss: "gets" may be read as "get", a
  character that it has no token for as another one. Where its tokens are few, little of the text is left.
- Even where every token matches exactly, the member reads the text in pieces that it would not have cut itself.
- All reference tokens that map to one token share its logit, so the mass of that token counts once for each.
- Tokens that no reference token maps to are lost to the fused distribution.
- A member gets a BOS only where the reference has one, and sees the reference's chat template, not its own.
- A special token without a counterpart gets no mass from a member; one without an end of its own never ends an
  answer in the linear pool, and keeps the logarithmic pool from ending it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from packllm.align.mined import NONE, alignment
from packllm.align.vocabulary import Vocabulary
from packllm.engines.transformers.engine import Engine
from packllm.engines.transformers.member import Member


class MinedEngine(Engine):
    """An engine that takes and predicts another vocabulary's ids: mapped on their way in, gathered on their way out.

    Args:
        engine: the model, which goes on serving others in its own ids.
        vocabulary: that model's.
        reference: the vocabulary to speak.
        size: how many of its ids; those that its own model has.
    """

    def __init__(self, engine: Engine, vocabulary: Vocabulary, reference: Vocabulary, size: int) -> None:
        self.__dict__.update(engine.__dict__)
        self.inner, self.vocabulary_size = engine, size
        found = alignment(reference, vocabulary.first(engine.vocabulary_size))
        self._ids = found.ids[:size].to(engine.device)
        self._absent = (found.distances[:size] == NONE).to(engine.device)

    def run(self, function: Callable[..., Any], owners: Sequence[Member], **inputs: Any) -> Any:
        inputs["input_ids"] = self._ids[inputs["input_ids"]]
        own = [owner.inner if isinstance(owner, MinedMember) else owner for owner in owners]
        return self.inner.run(function, own, **inputs)

    def real(self, logits: Tensor) -> Tensor:
        logits = self.inner.real(logits)
        gathered = logits.index_select(-1, self._ids.to(logits.device))
        return gathered.masked_fill(self._absent.to(logits.device), -torch.inf)


class MinedMember(Member):
    """A member that reads and predicts the token ids of another one. All that is counted is counted on the member.

    Args:
        member: any member.
        reference: whose ids it is to speak.
        engine: of its model for these ids.
    """

    def __init__(self, member: Member, reference: Member, engine: MinedEngine) -> None:
        self.__dict__.update(member.__dict__)
        self.inner, self.engine = member, engine
        self.tokenizer, self.encoder, self.end_ids = reference.tokenizer, reference.encoder, reference.end_ids
        self.vocabulary, self.vocabulary_size = reference.vocabulary, reference.vocabulary_size


def translated(members: Sequence[Member], reference: Member) -> list[MinedMember]:
    """The members in the reference's ids; those that share an engine share one again."""
    engines: dict[int, MinedEngine] = {}
    for member in members:
        if id(member.engine) not in engines:
            ids = reference.vocabulary, reference.vocabulary_size
            engines[id(member.engine)] = MinedEngine(member.engine, member.vocabulary, *ids)
    return [MinedMember(member, reference, engines[id(member.engine)]) for member in members]
