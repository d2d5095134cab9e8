"""The table of calls that every back end and every precision is held to, and random ones."""

from __future__ import annotations

import random
from typing import Any

import torch

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32

CASES: dict[str, dict[str, Any]] = {
    **{f"dim-{d}": {"dim": d, "dtype": t} for d, t in ((16, FP32), (40, BF16), (72, HALF), (80, BF16), (96, HALF))},
    "dim-128": {"dim": 128, "dtype": BF16, "q_len": 200, "block_q": 128, "block_k": 128},
    "dim-256": {"dim": 256, "dtype": BF16, "heads": 1},
    **{f"length-{n}": {"q_len": n, "dtype": HALF} for n in (1, 15, 63, 64, 129)},
    "lengths-differ": {"q_len": 33, "k_len": 200, "block_q": 32, "dtype": BF16},
    "odd-blocks": {"q_len": 100, "block_q": 48, "block_k": 80, "heads": 1},
    "all-blocks": {"density": 1.1, "dtype": BF16},
    "no-blocks": {"density": 0.0},
    "grouped-heads": {"heads": 4, "key_heads": 2, "list_heads": 4, "dtype": HALF},
    "list-per-head": {"list_heads": 2, "q_len": 150, "block_q": 32},
    "list-per-sample": {"batch": 2, "list_batch": 2, "list_heads": 2, "dtype": BF16},
    "shared-list-in-batch": {"batch": 2, "dtype": BF16},
    "bias": {"bias": "finite", "dtype": BF16, "batch": 2},
    "bias-inf": {"bias": "inf", "q_len": 129, "full": True},
    "orders": {"orders": True, "q_len": 128, "dtype": BF16, "full": True},
    "orders-holes": {"orders": True, "holes": 40, "q_len": 100, "full": True, "list_heads": 2},
    "orders-holes-bias": {"orders": True, "holes": 70, "q_len": 90, "bias": "inf", "full": True},
    "orders-full-behind-holes": {
        "orders": True, "holes": 90, "q_len": 120, "block_k": 16, "bias": "finite", "full": True,
        "density": 1.1, "heads": 1,
    },
    "orders-per-sample": {"orders": True, "holes": 9, "batch": 2, "list_batch": 2, "dtype": HALF},
    "box": {"predicate": "box", "dtype": BF16, "full": True, "q_len": 129},
    "disk": {"predicate": "disk", "full": True},
    "band": {"predicate": "band", "dtype": HALF},
    "box-orders-holes-bias": {
        "predicate": "box", "orders": True, "holes": 30, "bias": "inf", "list_heads": 2, "full": True,
        "q_len": 110,
    },
}  # fmt: skip


def random_case(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    case = {
        "seed": seed,
        "dtype": draw.choice([HALF, BF16, FP32]),
        "batch": draw.choice([1, 2]),
        "q_len": draw.randint(1, 150),
        "k_len": draw.randint(1, 150),
        "dim": draw.choice([16, 24, 40, 64, 72, 96]),
        "block_q": draw.choice([16, 32, 64]),
        "block_k": draw.choice([32, 48, 64]),
        "density": draw.random() * 1.2,
        "bias": draw.choice(["", "", "finite", "inf"]),
        "predicate": draw.choice(["", "", "box", "disk", "band"]),
        "full": draw.random() < 0.5,
        "orders": draw.random() < 0.5,
        "heads": draw.choice([1, 2, 4]),
    }
    case["key_heads"] = draw.choice([n for n in (1, 2, 4) if case["heads"] % n == 0])
    case["list_heads"] = draw.choice([1, case["heads"]])
    case["list_batch"] = draw.choice([1, case["batch"]])
    case["holes"] = draw.choice([0, 0, 17, 60]) if case["orders"] else 0
    return case
