"""Compile the kernels for GPUs that are not here; prints one JSON line per variant.

Runs as a process of its own, because TRITON_INTERPRET=1 replaces kernels when they are defined.
Usage: python compile_ahead.py CAPABILITY...
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import time

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_accel.kernels.block_sparse import triton as kernels
from dit_accel.kernels.block_sparse.api import _checked
from dit_accel.kernels.block_sparse.problem import Predicate, Problem
from dit_accel.kernels.block_sparse.tiles import choose

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}


def problem_of(dim: int, dtype: torch.dtype, block_q: int, block_k: int, feature: str, length: int) -> Problem:
    """A small call with one feature switched on."""
    slots = -(-length // 128) * 128
    q = torch.zeros(1, length, 16, dim, dtype=dtype)
    order = torch.zeros(1, 16, slots, dtype=torch.int32) if "order" in feature else None
    coords = torch.zeros(3, length, dtype=torch.int32)
    index = torch.zeros(1, 16, slots // block_q, 16, dtype=torch.int32)
    return _checked(
        q, q, q, index, index[..., 0].contiguous(), block_q, block_k, index[..., 0].contiguous(), order, order,
        torch.zeros(1, 1, length) if "bias" in feature else None,
        Predicate("box", (1, 1, 1), coords, coords) if "predicate" in feature else None,
        None,
    )  # fmt: skip


def compile_for(capability: int, problem: Problem, tile) -> triton.compiler.CompiledKernel:
    """Compile exactly what a launch of this call would."""
    out, lse = torch.empty_like(problem.q), torch.empty(1, 16, problem.q.shape[1])
    kernels._pack = lambda x, order: x.new_empty(x.shape[0], x.shape[2], order.shape[2], x.shape[3]).transpose(1, 2)
    _, args, constants = kernels.launch(problem, tile, out, lse)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    names = kernels._attention_kernel.arg_names
    signature, attrs = {}, {}
    for at, (name, value) in enumerate(zip(names, args)):
        signature[name] = type_of(value)
        if signature[name] == "constexpr":
            constants[name] = value
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attrs[(at,)] = [["tt.divisibility", 16]]
    signature |= {name: "constexpr" for name in names[len(args) :]}
    source = ASTSource(kernels._attention_kernel, signature, constants, attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def type_of(value) -> str:
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def variants():
    bf16, fp32 = torch.bfloat16, torch.float32
    yield "bf16-128", problem_of(128, bf16, 128, 128, "", 1024)
    yield "bf16-128-narrow", problem_of(128, bf16, 128, 64, "", 1024)
    yield "bf16-64-small", problem_of(64, bf16, 64, 64, "", 1024)
    yield "bf16-64-ragged", problem_of(64, bf16, 128, 128, "", 1000)
    yield "bf16-72-bias", problem_of(72, bf16, 128, 64, "bias", 1024)
    yield "bf16-256-order", problem_of(256, bf16, 128, 128, "order", 1024)
    yield "bf16-128-order-bias-predicate", problem_of(128, bf16, 128, 128, "order bias predicate", 1024)
    yield "bf16-128-predicate", problem_of(128, bf16, 128, 64, "predicate", 1024)
    yield "fp32-128", problem_of(128, fp32, 64, 64, "", 1024)
    yield "fp32-256-order-bias-predicate", problem_of(256, fp32, 128, 128, "order bias predicate", 1024)


def main(capabilities: list[int]) -> None:
    for capability, (name, problem) in itertools.product(capabilities, variants()):
        started = time.perf_counter()
        q = problem.q
        tile = choose(
            divmod(capability, 10), triton.next_power_of_2(q.shape[3]), q.element_size(),
            problem.block_q, problem.block_k, splits=problem.splits,
        )  # fmt: skip
        compiled = compile_for(capability, problem, tile)
        report(capability, name, tile, compiled, started)


def report(capability, name, tile, compiled, started) -> None:
    line = {
        "capability": capability,
        "name": name,
        "tile": str(tile),
        "shared": compiled.metadata.shared,
        "tma": bool(re.search(r"cp\.async\.bulk\.tensor", compiled.asm["ptx"])),
        "seconds": round(time.perf_counter() - started, 2),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
