"""What the Hopper kernel's fetching warp does: take query tiles, read their lists, fill the ring of key tiles."""

# Gluon is not Python: pyright cannot follow constexprs, layouts and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

TILE_K = gl.constexpr(128)  # keys of a tile: one block of 128, or as many smaller ones as fit
# names that Triton has changed since 3.6
meet = getattr(gl, "barrier", None) or gl.thread_barrier
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def list_of(tile, lists, PARTS: gl.constexpr, SPLIT: gl.constexpr, RANKED: gl.constexpr):
    """Place of a query tile, its list, the list's length, and how many key tiles need a mask and how many there are.

    A list is walked from its end, where the partial blocks are. With several blocks a tile the list's last block also
    fills the parts of the first tile that are left over, and the mask hides them.
    """
    (
        q_tiles, heads, index_ptr, count_ptr, full_ptr, index_stride_b, index_stride_h, index_stride_q,
        count_stride_b, count_stride_h, count_stride_q, full_stride_b, full_stride_h, full_stride_q, list_width,
        rank_ptr, rank_stride_b, rank_stride_h,
    ) = lists  # fmt: skip
    row = tile % q_tiles
    h = (tile // q_tiles) % heads
    b = (tile // q_tiles) // heads
    b64, h64 = b.to(gl.int64), h.to(gl.int64)
    if RANKED:
        row = gl.load(rank_ptr + b64 * rank_stride_b + h64 * rank_stride_h + row).to(gl.int32)
    index_ptr += b64 * index_stride_b + h64 * index_stride_h + row.to(gl.int64) * index_stride_q
    n = gl.load(count_ptr + b64 * count_stride_b + h64 * count_stride_h + row * count_stride_q)
    n = gl.minimum(n, list_width)
    masked = left_over(n, PARTS)
    if SPLIT:
        n_full = gl.load(full_ptr + b64 * full_stride_b + h64 * full_stride_h + row * full_stride_q)
        masked += n - gl.minimum(n_full, n)
    return row, h, b, index_ptr, n, (masked + PARTS - 1) // PARTS, (n + PARTS - 1) // PARTS


@gluon.jit
def left_over(n, PARTS: gl.constexpr):
    """How many parts of the first tile hold no block of a list of n."""
    return (PARTS - n % PARTS) % PARTS


@gluon.jit
def first_slot(index_ptr, n, tile, part, BLOCK_K: gl.constexpr):
    """Where the key block begins that fills one part of a tile."""
    PARTS: gl.constexpr = TILE_K // BLOCK_K
    behind = tile * PARTS + part - left_over(n, PARTS)
    return gl.load(index_ptr + (n - 1 - gl.maximum(behind, 0))) * BLOCK_K


@gluon.jit
def fetch(
    k_desc, v_desc, k_parts, v_parts, ring, steps, step_ptr, lists, tiles, k_blocks,
    heads, heads_per_key_head, heads_per_value_head,
    told, next_ptr,
    BLOCK_K: gl.constexpr, SPLIT: gl.constexpr, RANKED: gl.constexpr, INT8: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that takes query tiles, as fast as they get done, and keeps the ring of key and value tiles full."""
    PARTS: gl.constexpr = TILE_K // BLOCK_K
    ALONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    k_full, v_full, k_free, v_free, tile_full, tile_free = ring
    done, turn = 0, 0
    tile = gl.program_id(0)
    while tile < tiles:
        tell(tile, told, tile_full, tile_free, turn, ALONE)
        _, h, b, index, n, _, n_tiles = list_of(tile, lists, PARTS, SPLIT, RANKED)
        k_head, v_head = h // heads_per_key_head, h // heads_per_value_head
        steps_at = step_ptr + (b * (heads // heads_per_key_head) + k_head).to(gl.int64) * k_blocks
        for i in range(n_tiles):
            firsts = ()
            for part in gl.static_range(PARTS):
                firsts += (first_slot(index, n, i, part, BLOCK_K),)
            stage, phase = done % STAGES, (done // STAGES) & 1
            if INT8:
                which = gl.arange(0, 2, ALONE)
                step = gl.load(steps_at + gl.where(which == 0, firsts[0], firsts[PARTS - 1]) // BLOCK_K)
            mbarrier.wait(k_free.index(stage), phase ^ 1)
            if INT8:
                steps.index(stage).store(step)
                meet()
            _fill(k_desc, k_parts, k_full.index(stage), stage, b, k_head, firsts, PARTS, STAGES)
            mbarrier.wait(v_free.index(stage), phase ^ 1)
            _fill(v_desc, v_parts, v_full.index(stage), stage, b, v_head, firsts, PARTS, STAGES)
            done += 1
        tile = gl.num_programs(0) + gl.atomic_add(next_ptr, 1)
        turn += 1
    tell(tile, told, tile_full, tile_free, turn, ALONE)


@gluon.jit
def _fill(desc, parts, barrier, stage, b, h, firsts, PARTS: gl.constexpr, STAGES: gl.constexpr):
    """Fetch one tile: of each part, chunk by chunk of its columns."""
    CHUNKS: gl.constexpr = parts.shape[0] // (STAGES * PARTS)
    COLUMNS: gl.constexpr = desc.block_type.shape[3]
    mbarrier.expect(barrier, desc.block_type.nbytes * CHUNKS * PARTS)
    for c in gl.static_range(CHUNKS):
        at = (stage * CHUNKS + c) * PARTS
        for part in gl.static_range(PARTS):
            _copy(desc, [b, h, firsts[part], c * COLUMNS], barrier, parts.index(at + part))


@gluon.jit
def tell(tile, told, tile_full, tile_free, turn, ALONE: gl.constexpr):
    """Say which query tile comes next, or that none does."""
    slot, phase = turn % 2, (turn // 2) & 1
    mbarrier.wait(tile_free.index(slot), phase ^ 1)
    told.index(slot).store(gl.full([1], 0, gl.int32, ALONE) + tile)
    release(tile_full.index(slot))


@gluon.jit
def heard(told, tile_full, tile_free, turn):
    """The query tile that the fetching warp has taken."""
    slot, phase = turn % 2, (turn // 2) & 1
    mbarrier.wait(tile_full.index(slot), phase)
    tile = gl.sum(told.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    release(tile_free.index(slot))
    return tile


@gluon.jit
def release(barrier):
    """Say that all four warps have read a tile."""
    meet()
    mbarrier.arrive(barrier)
