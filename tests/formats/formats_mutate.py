"""Seeded changes of a good GGUF: in one value, in one claim, in one byte."""

from __future__ import annotations

import struct
from random import Random

from formats_draft import ARRAY, F32, SIZES, STRING, U32, Draft, Pair, Row, text, u32, u64

OPTIONAL = (
    *("attention.key_length", "attention.value_length", "attention.sliding_window", "attention.head_count_kv"),
    *("embedding_length_out", "nextn_predict_layers", "pooling_type", "rope.dimension_count", "vocab_size"),
    *("expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count", "expert_shared_count"),
    *("leading_dense_block_count", "expert_feed_forward_length", "attention.q_lora_rank", "ssm.conv_kernel"),
)
NUMBERS = (0, 1, 2, 3, 7, 31, 255, 256, 1023, 65_535, 2**31 - 1, 2**31, 2**32 - 1)


def mutate(draft: Draft, random: Random) -> tuple[bytes, str]:
    """Change a good file once; return its bytes and what was done."""
    changes = (_metadata_value, _metadata_value, _new_key, _pair, _row, _header, _bytes, _array_element, _swap)
    change = random.choice(changes)
    what = change(draft, random)
    raw = draft.encode()
    if change is _bytes:
        raw, what = _flip(raw, random, draft.boundaries()[-1])
    return raw, f"{change.__name__}: {what}"


def _number(random: Random) -> int:
    return random.choice((*NUMBERS, random.getrandbits(32)))


def _metadata_value(draft: Draft, random: Random) -> str:
    pair = random.choice([pair for pair in draft.pairs if pair.kind in SIZES])
    size = SIZES[pair.kind]
    floats = (0.0, -1.0, 1e30, float("nan"), float("inf"))
    raw = struct.pack("<f", random.choice(floats)) if pair.kind == F32 else u64(_number(random))
    pair.value = raw[:size].ljust(size, b"\0")
    return f"{pair.key!r} = {pair.value!r}"


def _new_key(draft: Draft, random: Random) -> str:
    architecture = "bert" if any(pair.key.startswith(b"bert.") for pair in draft.pairs) else "llama"
    for _ in range(random.randrange(1, 4)):
        draft.put(f"{architecture}.{random.choice(OPTIONAL)}", U32, u32(_number(random)))
    return f"{draft.pairs[-3:]}"


def _pair(draft: Draft, random: Random) -> str:
    pair = random.choice(draft.pairs)
    way = random.randrange(5)
    if way == 0:
        draft.pairs.remove(pair)
    elif way == 1:
        pair.kind = random.randrange(14)
    elif way == 2:
        pair.length = _number(random)
    elif way == 3 and pair.kind == STRING:
        pair.value = text(random.randbytes(random.randrange(40)))
    else:
        pair.key = pair.key[:-1] + bytes([random.randrange(256)])
    return f"way {way} of {pair.key!r}, kind {pair.kind}"


def _row(draft: Draft, random: Random) -> str:
    row: Row = random.choice(draft.rows)
    way = random.randrange(5)
    if way == 0:
        draft.rows.remove(row)
    elif way == 1:
        row.kind = random.randrange(50)
    elif way == 2:
        row.shape[random.randrange(len(row.shape))] = random.choice((1, 2, 16, 32, 63, 65, 128, _number(random)))
    elif way == 3:
        row.offset = random.choice((0, 32, row.offset + 32, row.offset ^ 1, _number(random) * 32))
    else:
        row.name = random.choice((row.name[::-1], row.name + b"x", b"output.weight", b"blk.9.attn_q.weight", b"\xff"))
    return f"way {way} of {row.name!r}, shape {row.shape}, kind {row.kind}, offset {row.offset}"


def _header(draft: Draft, random: Random) -> str:
    way = random.randrange(3)
    if way == 0:
        draft.keys = random.choice((0, len(draft.pairs) - 1, len(draft.pairs) + 1, 2**63, 2**64 - 1))
    elif way == 1:
        draft.tensors = random.choice((0, len(draft.rows) - 1, len(draft.rows) + 1, 2**63, 2**64 - 1))
    else:
        draft.version = u32(random.choice((0, 1, 2, 4, 0x03000000, _number(random))))
    return f"way {way}: {draft.keys} {draft.tensors} {draft.version!r}"


def _array_element(draft: Draft, random: Random) -> str:
    pair: Pair = random.choice([pair for pair in draft.pairs if pair.kind == ARRAY])
    raw = bytearray(pair.value)
    at = random.choice((random.randrange(12), random.randrange(len(raw))))
    raw[at] = random.choice((0, 1, 2, 6, 255, random.randrange(256)))
    pair.value = bytes(raw)
    return f"{pair.key!r} at {at}"


def _swap(draft: Draft, random: Random) -> str:
    first, second = random.sample(draft.pairs, 2)
    first.kind, second.kind, first.value, second.value = second.kind, first.kind, second.value, first.value
    return f"{first.key!r} and {second.key!r}"


def _bytes(draft: Draft, random: Random) -> str:
    return f"{len(draft.pairs)} pairs, seed state {random.random()}"


def _flip(raw: bytes, random: Random, data_at: int) -> tuple[bytes, str]:
    """Change one to eight bytes, mostly in the header, sometimes in the weights."""
    changed, end = bytearray(raw), random.choice((data_at, data_at, len(raw)))
    places = [random.randrange(end) for _ in range(random.randrange(1, 9))]
    for at in places:
        changed[at] = random.randrange(256)
    return bytes(changed), f"bytes {places}"
