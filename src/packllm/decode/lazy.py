"""Lazy mixture sampling: one member runs for each token, and the samples follow the mixture exactly (METHODS §6).

To draw from p = Σ λ_k p_k, draw k from λ and then a token from p_k alone. Members that are not drawn need not run. A
member that is drawn first reads, in one block, the tokens that it missed. So a token costs one pass, whatever the
number of members; if log-probabilities are requested, all members run. This is exact only for the linear pool at
temperature 1 without filters, penalties and biases: otherwise the fused distribution is no mixture of the members'.

With adaptive weights the drawn member is a hidden Markov path (weights/adaptive.py). A row draws one switching rate r.
At each token the member stays with probability 1 - r; otherwise it is drawn again from the prompt's weights. The answer
then has the distribution that the filter over all members gives, although the others read nothing. So the reported
weights stay those of the prompt, unless all members run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from packllm.decode.tokens import Ensemble, Row, Slot, fused_row
from packllm.errors import OptionError
from packllm.options import Options
from packllm.weights import find
from packllm.weights.adaptive import RATES, TRUST

_PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": None, "min_p": 0.0, "repetition_penalty": 1.0}
_PLAIN |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": None, "json_schema": None}


def check_lazy(options: Options) -> None:
    """Raise OptionError unless each token is a draw from the plain mixture."""
    for name, needed in _PLAIN.items():
        if (value := getattr(options, name)) != needed:
            raise OptionError(f"decoding='lazy' needs {name}={needed}, not {value!r}; use decoding='auto'")
    if options.tool_choice not in (None, "auto", "none"):
        raise OptionError(
            f"decoding='lazy' cannot guarantee the form that tool_choice={options.tool_choice!r} demands; use 'auto'"
        )
    weighting = options.weighting
    if (options.pool or ("linear" if isinstance(weighting, dict) else find(weighting).pool)) == "log":
        raise OptionError(
            f"decoding='lazy' draws from a mixture, but weighting={weighting!r} uses the logarithmic pool; "
            f"use pool='linear' or decoding='auto'"
        )


def lazy_ids(ensemble: Ensemble, rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """Yield (row, token id) as generate_ids does. Each row draws its own members."""
    missed: dict[Slot, list[int]] = {slot: [] for slot in ensemble.lines}
    speakers = [Speaker(row) for row in rows]
    while not all(row.done for row in rows):
        for r, row in enumerate(rows):
            if row.done:
                continue
            token = None
            while token is None:
                token = _draw_token(ensemble, row, r, missed, speakers[r])
            for slot, tokens in missed.items():
                if slot[1] == r:
                    tokens.append(token)
            yield r, token


class Speaker:
    """Draws the member that gives a row's next token."""

    def __init__(self, row: Row) -> None:
        self._row = row
        self._last: int | None = None
        self._rate = RATES[_draw(row, TRUST)] if row.moving is not None else 1.0

    def next(self) -> int:
        current = self._row.weights
        weights = [value if current.values[k] else 0.0 for k, value in enumerate(current.at_start.values)]
        last = self._last
        if last is None or not weights[last] or self._rate == 1 or _draw(self._row, (1 - self._rate, self._rate)):
            last = self._last = _draw(self._row, weights)
        return last


def _draw(row: Row, probabilities: Sequence[float]) -> int:
    return row.sample(torch.tensor(probabilities).log())


def _draw_token(ensemble: Ensemble, row: Row, r: int, missed: dict[Slot, list[int]], speaker: Speaker) -> int | None:
    """A token of a member drawn by the weights. None if that member failed, or if not all members have the token: then
    both are drawn again."""
    k = speaker.next()
    readers = [k] if row.recorder is None else ensemble.running(r)
    if blocks := {(i, r): missed[i, r] for i in readers if missed[i, r]}:
        ensemble.read(blocks)
        missed |= {slot: [] for slot in blocks}
    parts = ensemble.parts(r)
    if k not in parts:
        return None
    token = row.sample(parts[k])
    if token >= min(len(part) for part in parts.values()):
        return None
    if row.recorder is not None:
        row.note(token, fused_row(parts, row.weights), parts)
        row.observe(token, parts)
    return token
