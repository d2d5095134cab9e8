"""The kernels compile for GPUs that are not here, within their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB
STACK_LIMIT = 512  # bytes a thread that did not fit in registers; where the assembler gives up, it leaves 5 KB and more
MORE_STACK = {
    "bf16-72-bias": 1280, "bf16-128-everything": 2048, "fp32-64": 1024, "int8-256-orders": 768,
    "int8-128-predicate": 1024, "int8-128-everything": 1536,
}  # fmt: skip
SCRIPT = Path(__file__).with_name("compile_ahead.py")


def compiled(*arguments: str) -> list[dict]:
    """What `compile_ahead.py` says of each variant; interpreting is off there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[2]), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(lines: list[dict]) -> None:
    assert lines
    for line in lines:
        assert line["shared"] <= SHARED_LIMIT[line["capability"]] << 10, line
        assert line["stack"] <= MORE_STACK.get(line["name"], STACK_LIMIT), line
        assert not line["tma"] or line["capability"] >= 90, line
        assert line["int8"] == ("int8" in line["name"] and "pack" not in line["name"]), line


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_main_variants_compile(capability):
    check(compiled(str(capability), "bf16-128", "bf16-64-ragged", "int8-128"))


def test_orders_bias_and_predicates_compile():
    check(compiled("90", "bf16-72-bias", "bf16-128-orders-full", "bf16-128-predicate", "fp32-64", "pack", "merge"))


def test_the_kernel_for_hopper_compiles():
    names = ("bf16-128", "bf16-128-narrow", "bf16-128-orders", "bf16-64-ragged", "bf16-128-small", "int8-128-orders")
    lines = compiled("90", *(f"hopper-{name}" for name in names))
    check(lines)
    assert all(line["tma"] and line["stack"] <= 16 for line in lines), lines


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_selection_compiles(capability):
    names = (
        "ada-norm",
        "means-two",
        "assign-128",
        "block-mass-128",
        "budget-digit",
        "lists-bits",
        "pooled-128",
        "blend",
        "unit-error-128",
    )
    check(compiled(str(capability), *names, "norm-rope-heads", "norm-rope-across"))


def test_other_selection_compiles():
    names = ("means-ragged", "means-direction", "assign-64", "block-max", "budget-rows", "top-mass", "shares-units")
    check(
        compiled(
            "90",
            *names,
            "descent-largest",
            "ada-norm-affine",
            "norm-rope-layer",
            "norm-rope-rounds-first",
            "norm-rope-halves",
        )
    )


@pytest.mark.full
@pytest.mark.parametrize("capability", sorted(SHARED_LIMIT))
def test_all_variants_compile(capability):
    check(compiled(str(capability)))
