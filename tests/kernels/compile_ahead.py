"""Compile the kernels for GPUs that are not here; prints one JSON line per variant, or the table of the docs.

Runs as a process of its own, because TRITON_INTERPRET=1 replaces kernels when they are defined.
Usage: python compile_ahead.py CAPABILITY [VARIANT...]
       python compile_ahead.py table [CAPABILITY...]
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_accel.kernels.ada_norm import triton as modulating
from dit_accel.kernels.blend import triton as blending
from dit_accel.kernels.block_lists import triton as listing
from dit_accel.kernels.block_mass import triton as weighing
from dit_accel.kernels.block_max import triton as maximal
from dit_accel.kernels.block_sparse import hopper
from dit_accel.kernels.block_sparse import quantised_pack as packing
from dit_accel.kernels.block_sparse import quantised_triton as rounded
from dit_accel.kernels.block_sparse import triton as attention
from dit_accel.kernels.block_sparse.api import _checked
from dit_accel.kernels.block_sparse.problem import Precision, Predicate, Problem
from dit_accel.kernels.block_sparse.tiles import choose
from dit_accel.kernels.budget import triton as budgeting
from dit_accel.kernels.descent import triton as searching
from dit_accel.kernels.kmeans import triton as clustering
from dit_accel.kernels.merge import triton as merging
from dit_accel.kernels.pooled import triton as pooling
from dit_accel.kernels.qk_norm_rope import Norm, Part
from dit_accel.kernels.qk_norm_rope import triton as turning
from dit_accel.kernels.row_shares import triton as sharing
from dit_accel.kernels.top_mass import triton as summing
from dit_accel.kernels.unit_error import triton as erring
from dit_accel.kernels.unit_means import triton as averaging

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
BF16, FP32 = torch.bfloat16, torch.float32
CAPABILITIES = (80, 86, 89, 90, 100, 120)
TYPES = {
    torch.int8: "i8", torch.uint8: "u8", BF16: "bf16", torch.float16: "fp16", FP32: "fp32", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip

# name: head dim, dtype, query block, key block, features, length
VARIANTS = {
    "bf16-128": (128, BF16, 128, 128, "", 1024),
    "bf16-128-narrow": (128, BF16, 128, 64, "", 1024),
    "bf16-128-small": (128, BF16, 64, 64, "", 1024),
    "bf16-64-small": (64, BF16, 64, 64, "", 1024),
    "bf16-64-ragged": (64, BF16, 128, 128, "", 1000),
    "bf16-72-bias": (72, BF16, 128, 64, "bias", 1024),
    "bf16-128-orders": (128, BF16, 128, 128, "orders", 1024),
    "bf16-128-orders-full": (128, BF16, 128, 128, "orders full", 1024),
    "bf16-128-predicate": (128, BF16, 128, 64, "predicate", 1024),
    "bf16-128-everything": (128, BF16, 128, 128, "orders bias predicate", 1024),
    "bf16-128-clusters": (128, BF16, 64, 16, "orders", 1024),
    "bf16-128-clusters-wide": (128, BF16, 128, 16, "orders full", 1024),
    "bf16-64-clusters": (64, BF16, 64, 32, "orders", 1024),
    "bf16-64-16-ragged": (64, BF16, 128, 16, "", 1000),
    "bf16-256-orders": (256, BF16, 128, 128, "orders", 1024),
    "fp32-64": (64, FP32, 64, 64, "", 1024),
    "fp32-128": (128, FP32, 128, 128, "", 1024),
    "fp32-256-everything": (256, FP32, 128, 128, "orders bias predicate", 1024),
}


def problem_of(dim: int, dtype: torch.dtype, block_q: int, block_k: int, features: str, length: int) -> Problem:
    """A call with 16 heads; strides and addresses are divisible as a model's are."""
    slots = -(-length // 128) * 128
    q = torch.zeros(1, length, 16, dim, dtype=dtype)
    order = torch.zeros(1, 16, slots, dtype=torch.int32) if "orders" in features else None
    coords = torch.zeros(3, length, dtype=torch.int32)
    index = torch.zeros(1, 16, slots // block_q, 16, dtype=torch.int32)
    count = index[..., 0].contiguous()
    return _checked(
        q, q, q, index, count, block_q, block_k, count if "full" in features else count.clone(), order, order,
        torch.zeros(1, 1, length) if "bias" in features else None,
        Predicate("box", (1, 1, 1), coords, coords) if "predicate" in features else None,
        None,
    )  # fmt: skip


def compile_attention(capability: int, problem: Problem, tile=None) -> triton.compiler.CompiledKernel:
    """Compile exactly what a launch of this call would."""
    q = problem.q
    out, lse = torch.empty_like(q), torch.empty(1, 16, q.shape[1])
    if tile is None:
        padded = triton.next_power_of_2(q.shape[3])
        blocks = (problem.block_q, problem.block_k)
        kind = attention.kind_of(problem)
        tile = choose(divmod(capability, 10), padded, q.element_size(), *blocks, kind)
    attention._pack = shaped_as_packed
    _, args, constants = attention.launch(problem, tile, out, lse)
    return compile_launch(attention._attention_kernel, capability, args, constants)


def shaped_as_packed(k: torch.Tensor, v: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the copy would return: it needs a GPU, and a launch only asks for its shape."""
    packed = k[:, :1].transpose(1, 2).repeat(1, 1, order.shape[2], 1).transpose(1, 2)
    return packed, packed


def compile_rounded(capability: int, name: str, pack: bool = False) -> triton.compiler.CompiledKernel:
    """The int8 kernel on a call of the table above, or the one that packs its keys and values."""
    problem = replace(problem_of(*VARIANTS[name]), precision="int8")
    room = packing.packed_room(problem)
    if pack:
        return compile_launch(packing._pack_kernel, capability, *packing.pack_launch(problem, room))
    blocks = (problem.block_q, problem.block_k)
    tile = rounded.choose(divmod(capability, 10), packing.padded(problem), *blocks, attention.kind_of(problem))
    out, lse = torch.empty_like(problem.q), torch.empty(1, 16, problem.q.shape[1])
    _, args, constants = rounded.launch(problem, room, tile, out, lse)
    return compile_launch(rounded._attention_kernel, capability, args, constants)


def compile_hopper(name: str, precision: Precision = "as given") -> triton.compiler.CompiledKernel:
    """The kernel of capability 9.0 on a call of the table above."""
    problem = replace(problem_of(*VARIANTS[name]), precision=precision)
    assert not hopper.misfits(problem)
    hopper._pack, hopper._processors = shaped_as_packed, lambda device: 132
    hopper.pack = packing.packed_room
    keys = hopper.keys_of(problem)
    out, lse = torch.empty_like(problem.q), torch.empty(1, 16, problem.q.shape[1])
    _, args, constants = hopper.launch(problem, keys, out, lse)
    return compile_launch(hopper.attention_kernel, 90, args, constants)


def compile_pack(capability: int) -> triton.compiler.CompiledKernel:
    x, order = torch.zeros(1, 16, 64, 128, dtype=BF16), torch.zeros(1, 1, 64, dtype=torch.int32)
    args = (x, x, x, x, order, *x.stride(), *x.stride(), 0, 0, 64, 16)
    return compile_launch(attention._pack_kernel, capability, args, {"D": 128, "D_PAD": 128, "ROWS": 32})


def compile_merge(capability: int) -> triton.compiler.CompiledKernel:
    out, lse = torch.zeros(1, 64, 16, 128, dtype=BF16), torch.zeros(1, 16, 64)
    args = (out, out, out, None, lse, lse, lse, None, out, lse, 1024, 64, 16)
    return compile_launch(merging._merge_kernel, capability, args, {"D": 128, "D_PAD": 128, "ROWS": 32})


def compile_means(capability: int, ragged: bool, two: bool = False) -> triton.compiler.CompiledKernel:
    """Equal units as a score asks for them, of one tensor or two, or those of clusters, which each head has its own."""
    x, out = torch.zeros(1, 1024, 16, 128, dtype=BF16), torch.zeros(1, 16, 8, 128)
    slots = torch.zeros(1, 16 if ragged else 1, 1024, dtype=torch.int32)
    bounds = torch.zeros(1, 16, 9, dtype=torch.int64) if ragged else 128
    _, args, constants = averaging.launch(x, slots, bounds, out, y=x if two else None)
    return compile_launch(averaging._means_kernel, capability, args, constants)


def compile_mass(capability: int, dim: int, dtype: torch.dtype) -> triton.compiler.CompiledKernel:
    q, slots = torch.zeros(1, 1024, 16, dim, dtype=dtype), torch.zeros(1024, dtype=torch.int32)
    tile = weighing.tile_of(128, q)[0]
    out, lse = torch.zeros(1, 16, 1024 // tile, 8), torch.zeros(1, 16, 1024)
    _, args, constants = weighing.launch(q, q, slots, slots, 128, 0.1, torch.zeros(1, 1, 1024), out, lse, False)
    return compile_launch(weighing._mass_kernel, capability, args, constants)


def compile_max(capability: int, dim: int, biased: bool) -> triton.compiler.CompiledKernel:
    q, slots = torch.zeros(1, 1024, 16, dim, dtype=BF16), torch.zeros(1024, dtype=torch.int32)
    biases = (torch.zeros(1, 16, 1024),) * 2 if biased else None
    out = torch.zeros(1, 16, 1024 // maximal.tile_of(128, q)[0], 8)
    _, args, constants = maximal.launch(q, q, slots, slots, 128, 0.1, biases, out)
    return compile_launch(maximal._max_kernel, capability, args, constants)


def compile_shares(capability: int, which: str) -> triton.compiler.CompiledKernel:
    """XAttention's runs as they lie, or sampled rows with slots and a bias, by unit or by key."""
    columns = 4728 if which == "runs" else 4096
    logits, bias = torch.zeros(1, 16, 8, columns), None if which == "runs" else torch.zeros(1, 1, columns)
    if which == "keys":
        normal, out = torch.zeros(1, 16, 8, 2), torch.zeros(1, 16, 4096)
        kernel, (_, args, constants) = sharing.launch_keys(logits, 0.1, bias, normal, out)[1]
        return compile_launch(kernel, capability, args, constants)
    slots, unit = (None, 8) if which == "runs" else (torch.zeros(4096, dtype=torch.int32), 64)
    out = torch.zeros(1, 16, 8, columns // unit)
    _, args, constants = sharing.launch_units(logits, slots, unit, 0.1, bias, out)
    return compile_launch(sharing._units_kernel, capability, args, constants)


def compile_descent(capability: int, which: int) -> triton.compiler.CompiledKernel:
    """Groups of 16 queries against units of 64 keys, as InfiniteHiP's recipe has them: the product, or the search."""
    queries, k = torch.zeros(1, 16, 64, 16, 128, dtype=BF16), torch.zeros(1, 1024, 16, 128, dtype=BF16)
    slots, tokens = torch.zeros(1024, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    most, out = torch.zeros(1, 16, 64, 1024), torch.zeros(1, 16, 64, 16)
    kernel, (_, args, constants) = searching.launches(queries, k, slots, tokens, 64, most, out, 0)[which]
    return compile_launch(kernel, capability, args, constants)


def compile_unit_error(capability: int, dim: int, dtype: torch.dtype) -> triton.compiler.CompiledKernel:
    """Clusters, which each head has its own."""
    q, k, means = torch.zeros(1, 16, 300, dim), torch.zeros(1, 1024, 16, dim, dtype=dtype), torch.zeros(1, 16, 100, dim)
    slots, bounds = torch.zeros(1, 16, 2048, dtype=torch.int32), torch.zeros(1, 16, 101, dtype=torch.int64)
    made = torch.zeros(3, 1, 16, 300, 100)
    tile = erring.choose(divmod(capability, 10), triton.next_power_of_2(dim), k.element_size())
    _, args, constants = erring.launch(q, k, k, slots, bounds, means, 0.1, made, tile)
    return compile_launch(erring._error_kernel, capability, args, constants)


def compile_error_share(capability: int) -> triton.compiler.CompiledKernel:
    _, args, constants = erring.sharing(torch.zeros(3, 1, 40, 591, 1183), 0.1)
    return compile_launch(erring._share_kernel, capability, args, constants)


def compile_top_mass(capability: int) -> triton.compiler.CompiledKernel:
    score, keep = torch.zeros(1, 40, 591, 591), torch.zeros(591, 591, dtype=torch.bool)
    _, args, constants = summing.launch(score, keep, 0.9, 0.1, torch.zeros(1, 40, 591, 591, dtype=torch.bool))
    return compile_launch(summing._mass_kernel, capability, args, constants)


def compile_form(capability: int, form: str) -> triton.compiler.CompiledKernel:
    x, out = torch.zeros(1, 1024, 16, 128, dtype=BF16), torch.zeros(1, 16, 8, 128)
    centre = torch.zeros(1, 16, 8, 128)
    _, args, constants = averaging.launch(x, torch.zeros(1, 1, 1024, dtype=torch.int32), 128, out, centre, form)
    return compile_launch(averaging._means_kernel, capability, args, constants)


def compile_assign(capability: int, dim: int, dtype: torch.dtype) -> triton.compiler.CompiledKernel:
    x, centroids = torch.zeros(1, 16, 1000, dim, dtype=dtype), torch.zeros(1, 16, 100, dim)
    _, args, constants = clustering.launch(x, centroids, torch.zeros(1, 16, 1000, dtype=torch.int32))
    return compile_launch(clustering._assign_kernel, capability, args, constants)


def compile_pooled(capability: int, dim: int, dtype: torch.dtype) -> triton.compiler.CompiledKernel:
    """Queries of 300 clusters against 1000, each head its own, as SVG-EAR has them."""
    q, means = torch.zeros(1, 1024, 16, dim, dtype=dtype), torch.zeros(1, 16, 1000, dim)
    bias, bits = torch.zeros(1, 16, 1000), torch.zeros(1, 16, 300, 34, dtype=torch.int32)
    row, lse = torch.zeros(1, 16, 1024, dtype=torch.int64), torch.zeros(1, 16, 1024)
    tile = pooling.choose(divmod(capability, 10), triton.next_power_of_2(dim), q.element_size())
    _, args, constants = pooling.launch(q, means, means, bias, bits, row, 0.1, q, lse, (q, lse), tile)
    return compile_launch(pooling._pooled_kernel, capability, args, constants)


def compile_packing(capability: int) -> triton.compiler.CompiledKernel:
    computed, bits = torch.zeros(1, 16, 300, 125, dtype=torch.uint8), torch.zeros(1, 16, 300, 34, dtype=torch.int32)
    _, args, constants = pooling.packing(computed, bits, 0, 1000)
    return compile_launch(pooling._bits_kernel, capability, args, constants)


def compile_blend(capability: int) -> triton.compiler.CompiledKernel:
    out, kept, rest = torch.zeros(1, 1024, 16, 128, dtype=BF16), torch.zeros(1, 16, 99), torch.zeros(1, 16, 99, 128)
    _, args, constants = blending.launch(out, kept, rest, torch.zeros(1, 1, 1024, dtype=torch.int64), out)
    return compile_launch(blending._blend_kernel, capability, args, constants)


def compile_lists(capability: int, bits: bool) -> triton.compiler.CompiledKernel:
    """A static cut, as a tile order has it, and 1183 key blocks, as Wan's 720p clips have them."""
    units = torch.zeros(1, 40, 591, 74 if bits else 591, dtype=torch.uint8 if bits else torch.bool)
    rows, keys = torch.zeros(1, 1, 591, dtype=torch.int64), torch.zeros(1, 1, 1183, dtype=torch.int64)
    out = torch.zeros(1, 40, 591, 1183, dtype=torch.int32)
    counts = torch.zeros(1, 40, 591, dtype=torch.int32)
    made = (out, counts, counts, counts.long())
    _, args, constants = listing.launch(units, rows, keys, rows, keys, 64, made)
    return compile_launch(listing._lists_kernel, capability, args, constants)


def compile_budget(capability: int, which: str) -> triton.compiler.CompiledKernel:
    score, keep = torch.zeros(1, 40, 591, 591), torch.zeros(591, 591, dtype=torch.bool)
    cost, out = torch.zeros(1, 1, 591), torch.zeros(1, 40, 591, 591, dtype=torch.bool)
    if which == "rows":
        _, args, constants = budgeting.launch_rows(score, keep, cost, 0.3, out)
        return compile_launch(budgeting._rows_kernel, capability, args, constants)
    found = (torch.zeros(8, 40, 16, dtype=torch.int64), torch.zeros(2, 40, 591, dtype=torch.int64))
    launches = budgeting.launch_heads(score, keep, cost, cost, 0.3, found, out)
    kernel, (_, args, constants) = launches[{"digit": 2, "level": -2, "cut": -1}[which]]
    return compile_launch(kernel, capability, args, constants)


def compile_norm_rope(capability: int, heads: int, norm: Norm, halves: bool = False) -> triton.compiler.CompiledKernel:
    """Tables by pair, strided, where a norm spans all heads (as Wan has them), else by channel."""
    q = torch.zeros(1, 1024, heads, 128, dtype=BF16)
    weight = torch.zeros(heads * 128 if norm.across_heads else 128, dtype=BF16)
    biases = (weight, weight) if norm.kind == "layer" else (None, None)
    table = torch.zeros(1024, 128)[:, :: 2 if norm.across_heads else 1]
    part = Part(q, q, weight, weight, *biases)
    _, args, constants = turning.launch(part, norm, table, table, 0, not halves, (q, q), 0)
    return compile_launch(turning._norm_rope_kernel, capability, args, constants)


def compile_ada_norm(capability: int, channels: int, affine: bool) -> triton.compiler.CompiledKernel:
    """Vectors as one product of six leaves them."""
    x = torch.zeros(1, 1024, channels, dtype=BF16)
    shift, scale = torch.zeros(1, 6 * channels, dtype=BF16).chunk(6, 1)[:2]
    weight = torch.zeros(channels, dtype=BF16) if affine else None
    _, args, constants = modulating.launch(x, scale, shift, 1e-6, weight, weight, x)
    return compile_launch(modulating._ada_norm_kernel, capability, args, constants)


OTHERS: dict[str, Callable[[int], triton.compiler.CompiledKernel]] = {
    **{
        f"int8-{name.removeprefix('bf16-')}": lambda capability, name=name: compile_rounded(capability, name)
        for name in VARIANTS
        if name.startswith("bf16")
    },
    "int8-pack": lambda capability: compile_rounded(capability, "bf16-128", pack=True),
    "int8-pack-orders-bias": lambda capability: compile_rounded(capability, "bf16-128-everything", pack=True),
    "pack": compile_pack,
    "merge": compile_merge,
    "means": lambda capability: compile_means(capability, ragged=False),
    "means-direction": lambda capability: compile_form(capability, "direction"),
    "means-apart": lambda capability: compile_form(capability, "apart"),
    "means-two": lambda capability: compile_means(capability, ragged=False, two=True),
    "means-ragged": lambda capability: compile_means(capability, ragged=True),
    "lists": lambda capability: compile_lists(capability, bits=False),
    "lists-bits": lambda capability: compile_lists(capability, bits=True),
    "top-mass": compile_top_mass,
    "unit-error-share": compile_error_share,
    "unit-error-64": lambda capability: compile_unit_error(capability, 64, BF16),
    "unit-error-128": lambda capability: compile_unit_error(capability, 128, BF16),
    "unit-error-256": lambda capability: compile_unit_error(capability, 256, BF16),
    "unit-error-128-fp32": lambda capability: compile_unit_error(capability, 128, FP32),
    "descent-largest": lambda capability: compile_descent(capability, 0),
    "descent-search": lambda capability: compile_descent(capability, 1),
    "shares-runs": lambda capability: compile_shares(capability, "runs"),
    "shares-units": lambda capability: compile_shares(capability, "units"),
    "shares-keys": lambda capability: compile_shares(capability, "keys"),
    "block-max": lambda capability: compile_max(capability, 32, biased=False),
    "block-max-biased": lambda capability: compile_max(capability, 128, biased=True),
    "block-mass-64": lambda capability: compile_mass(capability, 64, BF16),
    "block-mass-128": lambda capability: compile_mass(capability, 128, BF16),
    "block-mass-256": lambda capability: compile_mass(capability, 256, BF16),
    "block-mass-128-fp32": lambda capability: compile_mass(capability, 128, FP32),
    "budget-rows": lambda capability: compile_budget(capability, "rows"),
    "budget-digit": lambda capability: compile_budget(capability, "digit"),
    "budget-level": lambda capability: compile_budget(capability, "level"),
    "budget-cut": lambda capability: compile_budget(capability, "cut"),
    "ada-norm": lambda capability: compile_ada_norm(capability, 3072, affine=False),
    "ada-norm-affine": lambda capability: compile_ada_norm(capability, 1920, affine=True),
    "norm-rope-heads": lambda capability: compile_norm_rope(capability, 24, Norm()),
    "norm-rope-halves": lambda capability: compile_norm_rope(capability, 24, Norm(), halves=True),
    "norm-rope-rounds-first": lambda capability: compile_norm_rope(capability, 24, Norm(rounds_first=True)),
    "norm-rope-across": lambda capability: compile_norm_rope(capability, 40, Norm(across_heads=True)),
    "norm-rope-layer": lambda capability: compile_norm_rope(capability, 48, Norm("layer")),
    "blend": compile_blend,
    "pooled-bits": compile_packing,
    "pooled-64": lambda capability: compile_pooled(capability, 64, BF16),
    "pooled-128": lambda capability: compile_pooled(capability, 128, BF16),
    "pooled-256": lambda capability: compile_pooled(capability, 256, BF16),
    "pooled-128-fp32": lambda capability: compile_pooled(capability, 128, FP32),
    "assign-64": lambda capability: compile_assign(capability, 64, BF16),
    "assign-128": lambda capability: compile_assign(capability, 128, BF16),
    "assign-256": lambda capability: compile_assign(capability, 256, BF16),
    "assign-128-fp32": lambda capability: compile_assign(capability, 128, FP32),
}

HOPPER: dict[str, Callable[[], triton.compiler.CompiledKernel]] = {
    **{f"hopper-{name}": lambda name=name: compile_hopper(name) for name in (
        "bf16-128", "bf16-128-narrow", "bf16-128-small", "bf16-64-small", "bf16-64-ragged", "bf16-128-orders",
        "bf16-128-orders-full", "bf16-128-clusters", "bf16-128-clusters-wide", "bf16-64-clusters", "bf16-64-16-ragged",
    )},
    **{f"hopper-int8-{name}": lambda name=name: compile_hopper(f"bf16-{name}", "int8") for name in (
        "128", "128-narrow", "64-ragged", "128-orders",
    )},
}  # fmt: skip


def compile_launch(kernel, capability: int, args: tuple, constants: dict[str, Any]) -> triton.compiler.CompiledKernel:
    """Compile with the types and the divisibility that these arguments would have at run time."""
    constants = dict(constants)
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    signature, attrs = {}, {}
    for at, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        signature[name] = type_of(value)
        if signature[name] == "constexpr":
            constants[name] = value
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attrs[(at,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(kernel.arg_names[len(args) :], "constexpr")
    if isinstance(kernel, GluonJITFunction):
        at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = GluonASTSource(kernel, signature, at, attrs)
    else:
        source = ASTSource(kernel, signature, constants, attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def type_of(value: object) -> str:
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, GluonDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape},{value.layout!r}>"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def measure(capability: int, name: str) -> dict[str, Any]:
    """Compile one variant and say what a program takes: shared memory and stack in bytes, registers a thread."""
    if name in HOPPER:
        compiled = HOPPER[name]()
    elif name in OTHERS:
        compiled = OTHERS[name](capability)
    else:
        compiled = compile_attention(capability, problem_of(*VARIANTS[name]))
    ptx = compiled.asm["ptx"]
    return {
        "capability": capability,
        "name": name,
        "shared": compiled.metadata.shared,
        **registers(compiled.asm["cubin"]),
        "tma": "cp.async.bulk.tensor" in ptx,
        "int8": bool(re.search(r"mma\S*(\.s8\.s8|kind::i8)", ptx)),
    }


def registers(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and the bytes of stack that what did not fit in them takes (the spills)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", said))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"])}


def table(capabilities: list[int]) -> None:
    """Print shared memory in KiB, registers and stack of every variant as Markdown."""
    print(f"Triton {triton.__version__}: shared memory in KiB / registers a thread / bytes of stack.\n")
    print("| kernel | " + " | ".join(f"sm_{capability}" for capability in capabilities) + " |")
    print("|---" * (len(capabilities) + 1) + "|")
    for name in (*VARIANTS, *OTHERS, *HOPPER):
        cells = [
            measure(capability, name) if name not in HOPPER or capability == 90 else None for capability in capabilities
        ]
        told = ["" if c is None else f"{c['shared'] / 1024:.0f} / {c['registers']} / {c['stack']}" for c in cells]
        print(f"| {name} | " + " | ".join(told) + " |", flush=True)


def main(first: str, rest: list[str]) -> None:
    if first == "table":
        table([int(capability) for capability in rest] or list(CAPABILITIES))
        return
    for name in rest or [*VARIANTS, *OTHERS, *(HOPPER if first == "90" else ())]:
        print(json.dumps(measure(int(first), name)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
