"""Prefill, extend and decode over a cache: the same bits as the forward of the whole sequence."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import tvm

from relax_impl.attention import Attention
from relax_impl.cached import PANEL, CachedAttention
from relax_impl.config import MPTConfig
from relax_impl.decoder import Decoder, Work
from relax_impl.kernels.cpu import FAST
from relax_impl.kernels.cpu.cached import cached_kernel
from relax_impl.operations import PLAIN
from relax_impl.runtime import InputError
from relax_impl.target import resolve

DTYPES = ("float16", "bfloat16", "float32")
LENGTH = 140
"""Past the 128 keys of one step of the running maximum, and past max_seq_len, which is 64."""
KINDS = {
    "multi-head": ({}, {}),
    "multi-query": ({"attn_type": "multiquery_attention"}, {}),
    "grouped": (
        {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "qk_ln": True, "clip_qkv": 1.5},
        {"no_bias": False},
    ),
    "whole vectors": ({}, {"d_model": 96, "n_heads": 3}),
}


def ids_of(rows: int = 2, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 91, (rows, length)).astype(np.int32)


@pytest.fixture(scope="module")
def decoder(raw, build):
    made = {}

    def make(kind="multi-head", dtype="float32", operations=None):
        key = kind, dtype, operations
        if key not in made:
            attn, top = KINDS[kind]
            chosen = operations and (lambda layer: operations)
            made[key] = Decoder(build(raw(attn, **top), dtype, chosen).model)
        return made[key]

    return make


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*(("multi-head", dtype) for dtype in DTYPES), *((kind, "float16") for kind in KINDS)],
)
def test_every_split_gives_the_bits_of_the_whole(kind, dtype, decoder):
    one, ids = decoder(kind, dtype), ids_of()
    whole = one.model.forward(ids)
    logits, _ = one.prefill(ids)
    assert np.array_equal(logits, whole)
    for split in (1, 5, 6, 7, 16, 127, 128, 129, LENGTH - 1):
        head, cache = one.prefill(ids[:, :split])
        rest = one.extend(cache, ids[:, split:])
        assert np.array_equal(head, whole[:, :split])
        assert np.array_equal(rest, whole[:, split:]), split


@pytest.mark.parametrize("operations", [FAST, PLAIN], ids=["kernels", "portable"])
def test_token_by_token_gives_the_bits_of_the_whole(operations, decoder):
    one, ids = decoder(operations=operations), ids_of(length=40)
    whole = one.model.forward(ids)
    _, cache = one.prefill(ids[:, :3])
    for at in range(3, ids.shape[1]):
        assert np.array_equal(one.decode(cache, ids[:, at]), whole[:, at]), at


def test_a_row_does_not_see_the_others(decoder):
    one, ids = decoder(), ids_of(3, 30)
    whole = one.model.forward(ids)
    for rows in ([2, 0, 1], [1], [0, 0, 1, 2, 2]):
        logits, cache = one.prefill(ids[rows, :20])
        assert np.array_equal(logits, whole[rows, :20])
        assert np.array_equal(one.extend(cache, ids[rows, 20:]), whole[rows, 20:])


def test_rows_of_unequal_lengths(decoder):
    one, ids = decoder(), ids_of(3, 30)
    whole, ends = one.model.forward(ids), np.array([30, 4, 17])
    padded = ids.copy()
    for row, end in enumerate(ends):
        padded[row, end:] = 90
    last, cache = one.prefill(padded, ends, last=True)
    assert np.array_equal(last[:, 0], whole[range(3), ends - 1])
    cache.truncate([10, 4, 17])
    for step in range(3):
        at = np.array([10, 4, 17]) + step
        assert np.array_equal(one.decode(cache, ids[range(3), at]), whole[range(3), at])


@pytest.mark.parametrize("offset", [128, 384])
def test_a_sequence_is_the_same_at_any_offset(offset, decoder):
    # A multiple of what the kernel counts keys by leaves the order of all sums as it was.
    one, ids = decoder(), ids_of(length=20)
    whole = one.model.forward(ids)
    padded = np.concatenate([np.full((2, offset), 5, np.int32), ids[:, :15]], axis=1)
    logits, cache = one.prefill(padded, starts=[offset, offset])
    assert np.array_equal(logits[:, offset:], whole[:, :15])
    for at in range(15, 20):
        assert np.array_equal(one.decode(cache, ids[:, at]), whole[:, at])


def test_learned_positions_count_from_the_first_token_and_end(raw, build):
    one = Decoder(build(raw({"alibi": False})).model)
    ids = ids_of(length=64)
    whole = one.model.forward(ids)
    padded = np.concatenate([np.zeros((2, 128), np.int32), ids[:, :60]], axis=1)
    logits, cache = one.prefill(padded, starts=[128, 128])
    assert np.array_equal(logits[:, 128:], whole[:, :60])
    assert np.array_equal(one.extend(cache, ids[:, 60:]), whole[:, 60:])
    with pytest.raises(InputError, match=r"at most 64 positions .* found 65"):
        one.decode(cache, ids[:, 0])


def test_a_fork_and_a_roll_back_are_as_if_nothing_had_been(decoder):
    one, ids = decoder(), ids_of(length=30)
    whole = one.model.forward(ids)
    _, cache = one.prefill(ids[:, :10])
    fork = cache.fork()
    one.extend(fork, ids[::-1, 10:])
    assert np.array_equal(one.extend(cache, ids[:, 10:]), whole[:, 10:])
    fork.truncate([10, 10])
    assert np.array_equal(one.extend(fork, ids[:, 10:]), whole[:, 10:])
    picked = cache.take([1, 1])
    picked.truncate([12, 29])
    tokens = np.array([ids[1, 12], ids[1, 29]])
    assert np.array_equal(one.decode(picked, tokens), whole[1, [12, 29]])


def test_a_decode_step_is_the_work_of_one_token(decoder):
    one, ids = decoder(), ids_of(length=50)
    before = dataclasses.replace(one.work)
    _, cache = one.prefill(ids, last=True)
    assert one.work - before == Work(calls=1, tokens=100, logits=2, scores=2 * 50 * 51 // 2)
    before = dataclasses.replace(one.work)
    one.decode(cache, ids[:, 0])
    assert one.work - before == Work(calls=1, tokens=2, logits=2, scores=2 * 51)


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_a_cache(kind, decoder):
    one = decoder(kind, "float16")
    c = one.model.config
    for batch, slots in ((1, 1), (3, 100)):
        cache = one.cache(batch, slots)
        assert slots <= cache.capacity < slots + PANEL
        expected = 2 * c.n_layers * c.kv_n_heads * c.head_dim * cache.capacity * 2
        assert cache.nbytes == batch * expected


def test_attention_has_no_buffer_that_grows(raw):
    config = MPTConfig.from_dict(raw())
    kernel = cached_kernel(FAST.cached, FAST.attention, config, "float16", 0.25)
    shapes = re.findall(r"alloc_\w+\(\(([^)]*)\)", kernel.script())
    assert len(shapes) > 10
    # Numbers alone: a size with a name would be one that grows.
    assert all(re.fullmatch(r"[\d, ]+", shape) for shape in shapes), shapes


def run_kernel(config: MPTConfig, arrays: list, slopes: np.ndarray) -> np.ndarray:
    target = resolve("llvm")
    with target:
        kernel = cached_kernel(CachedAttention(), Attention(), config, "float32", config.scale)
        built = tvm.compile(kernel.with_attr("global_symbol", "kernel"), target=target)
    out = tvm.runtime.tensor(np.zeros_like(arrays[0]))
    built["kernel"](
        *(tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays),
        tvm.runtime.tensor(slopes),
        out,
    )
    return out.numpy()


def test_heads_may_trade_places(raw):
    config, random = MPTConfig.from_dict(raw()), np.random.default_rng(3)
    h, d = config.n_heads, config.head_dim
    q = random.standard_normal((1, 7, h, d)).astype(np.float32)
    keys = random.standard_normal((1, h, 2, d, PANEL)).astype(np.float32)
    values = random.standard_normal((1, h, 2 * PANEL, d)).astype(np.float32)
    past, starts = np.array([20], np.int32), np.array([3], np.int32)
    slopes = random.uniform(0, 1, h).astype(np.float32)
    turn = np.roll(np.arange(h), 1)
    plain = run_kernel(config, [q, keys, values, past, starts], slopes)
    turned = run_kernel(
        config, [q[:, :, turn], keys[:, turn], values[:, turn], past, starts], slopes[turn]
    )
    assert np.array_equal(turned, plain[:, :, turn])
    assert not np.array_equal(
        run_kernel(config, [q, keys, values, past, starts], slopes[turn]), plain
    )


def test_nothing_is_compiled_between_steps(decoder, monkeypatch):
    one, ids = decoder(), ids_of(3, 25)
    monkeypatch.setattr(tvm, "compile", lambda *a, **k: pytest.fail("compiled"))
    for batch, length in ((1, 1), (2, 9), (3, 25)):
        _, cache = one.prefill(ids[:batch, :length])
        one.decode(cache, ids[:batch, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, c: d.extend(c, [[1, 2]]), "ids: expected 2 sequences as the cache, found 1"),
        (lambda d, c: d.extend(c, [[1], [91]]), r"ids: expected 0\.\.90"),
        (lambda d, c: d.extend(c, [[1], [2]], [0, 1]), r"lengths: expected 1\.\.1, found 0\.\.1"),
        (lambda d, c: d.extend(c, [[1], [2]], [1]), "lengths: expected 2 integers"),
        (lambda d, c: d.decode(c, [[1], [2]]), r"ids: expected shape \(batch,\)"),
        (lambda d, c: d.prefill([[1, 2]], starts=[2]), r"starts: expected 0\.\.1"),
        (lambda d, c: d.prefill([[1, 2]], [1], [1]), "lengths: expected a token after the padding"),
        (lambda d, c: d.prefill([]), r"ids: expected shape \(batch, sequence\)"),
        (lambda d, c: d.cache(0), "batch, capacity: expected at least 1"),
        (lambda d, c: c.truncate([5, 4]), r"lengths: expected from \[0, 0\] to \[4, 4\]"),
        (lambda d, c: c.take([2]), r"rows: expected 0\.\.1"),
        (lambda d, c: c.take([]), "rows: expected at least one"),
    ],
)
def test_what_does_not_fit_is_named(call, message, decoder):
    one = decoder()
    _, cache = one.prefill(ids_of(length=4))
    with pytest.raises(InputError, match=message):
        call(one, cache)
