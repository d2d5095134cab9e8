"""Print which keys each query sees in the `natten` package's own windows, into `natten_windows.json`.

    python tests/data/make_natten.py

Needs natten, which is none of the test suite's packages (0.21.7 installs and runs on a CPU, through torch's flex
attention). The masks come out of its public functions: with queries of zeros every seen key weighs the same, and values
that are one for a single key each show which those are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("natten_windows.json")
CHANNELS = 16
CASES = (  # extent, kernel, stride and dilation of each axis
    ((7,), (3,), (1,), (1,)),
    ((9,), (4,), (1,), (1,)),
    ((11,), (5,), (3,), (1,)),
    ((12,), (6,), (4,), (1,)),
    ((13,), (4,), (3,), (1,)),
    ((16,), (8,), (8,), (1,)),
    ((13,), (3,), (1,), (2,)),
    ((17,), (4,), (2,), (2,)),
    ((19,), (3,), (3,), (3,)),
    ((10,), (3,), (2,), (3,)),
    ((23,), (7,), (5,), (1,)),
    ((8,), (8,), (3,), (1,)),
    ((6, 7), (3, 5), (1, 1), (1, 1)),
    ((8, 5), (4, 3), (2, 3), (1, 1)),
    ((7, 9), (3, 4), (1, 2), (2, 1)),
    ((9, 7), (2, 3), (2, 1), (3, 2)),
    ((3, 4, 5), (2, 3, 3), (1, 1, 1), (1, 1, 1)),
    ((4, 5, 4), (3, 4, 2), (2, 3, 2), (1, 1, 1)),
    ((4, 5, 6), (2, 2, 3), (1, 2, 1), (2, 1, 2)),
)


def rows(extent: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> list[str]:
    """Return a string for each query in raster order, "1" at each key it sees."""
    import natten

    tokens = math.prod(extent)
    heads = -(-tokens // CHANNELS)
    shape = (1, *extent, heads, CHANNELS)
    value = torch.eye(tokens, heads * CHANNELS).view(shape)
    attend = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(extent)]
    window: Any = {"kernel_size": tuple(kernel), "stride": tuple(stride), "dilation": tuple(dilation)}
    seen = attend(torch.zeros(shape), torch.zeros(shape), value, backend="flex-fna", **window)
    mask = seen.view(tokens, -1)[:, :tokens] > 0
    return ["".join("01"[key] for key in query) for query in mask.int().tolist()]


def main() -> None:
    import natten

    masks = [
        json.dumps({**dict(zip(("extent", "kernel", "stride", "dilation"), case, strict=True)), "rows": rows(*case)})
        for case in CASES
    ]
    made_by = json.dumps(f"natten {natten.__version__}, na1d, na2d and na3d, by make_natten.py")
    FILE.write_text(f'{{"made_by": {made_by}, "masks": [\n' + ",\n".join(masks) + "\n]}\n")


if __name__ == "__main__":
    main()
