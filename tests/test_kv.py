"""Caches with room to spare equal ones that are put together anew at every token, whoever shares what."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from packllm.engines.transformers import kv

MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 2), st.integers(1, 70)),
        st.tuples(st.just("crop"), st.integers(0, 2), st.integers(1, 40)),
        st.tuples(st.just("fork"), st.integers(0, 2), st.none()),
    ),
    min_size=15,
    max_size=40,
)


def empty():
    return kv.full(LlamaConfig(num_hidden_layers=1, hidden_size=6, num_attention_heads=2))


def append(cache, states):
    return cache.update(*states, 0)


def states(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, 2, count, 3, generator=generator) for _ in range(2))


@given(moves=MOVES)
@settings(deadline=None)
def test_any_history_equals_concatenation(moves):
    first = states(5, 0)
    caches, plain = [empty()], [first]
    append(caches[0], first)
    for seed, (move, at, argument) in enumerate(moves, 1):
        at %= len(caches)
        cache, (keys, values) = caches[at], plain[at]
        if move == "append":
            added = states(argument, seed)
            plain[at] = tuple(torch.cat(pair, dim=-2) for pair in zip((keys, values), added, strict=True))
            for ours, theirs in zip(append(cache, added), plain[at], strict=True):
                assert torch.equal(ours, theirs)
        elif move == "crop":
            count = min(argument, keys.shape[-2] - 1)
            if count:
                kv.crop(cache, count)
            plain[at] = tuple(each[..., : each.shape[-2] - count, :] for each in (keys, values))
        else:
            caches.append(kv.fork(cache))
            plain.append((keys, values))
        for each, (keys, values) in zip(caches, plain, strict=True):
            assert each.get_seq_length() == keys.shape[-2]
            assert torch.equal(each.layers[0].keys, keys)
            assert torch.equal(each.layers[0].values, values)


def test_those_that_share_a_beginning_go_on_apart():
    cache = empty()
    append(cache, states(5, 0))
    append(cache, states(1, 1))
    twin = kv.fork(cache)
    ours, theirs = append(cache, states(1, 2))[0], append(twin, states(1, 3))[0]
    assert torch.equal(ours[..., -1:, :], states(1, 2)[0])
    assert torch.equal(theirs[..., -1:, :], states(1, 3)[0])
    kv.crop(cache, 3)
    append(cache, states(2, 4))
    assert torch.equal(theirs[..., 3:5, :], states(5, 0)[0][..., 3:5, :])


def test_appending_moves_nothing_but_now_and_then():
    cache = empty()
    append(cache, states(100, 0))
    places = {append(cache, states(1, seed))[0].data_ptr() for seed in range(1000)}
    assert len(places) <= 1000 / kv.SPARE + 1


def test_a_token_taken_back_is_written_over_in_place():
    cache = empty()
    append(cache, states(100, 0))
    place = append(cache, states(4, 1))[0].data_ptr()
    kv.crop(cache, 3)
    assert append(cache, states(2, 2))[0].data_ptr() == place


def test_room_to_spare_is_small():
    cache = empty()
    append(cache, states(4000, 0))
    keys, _ = append(cache, states(1, 1))
    assert keys.untyped_storage().nbytes() <= 1.02 * keys.nbytes
