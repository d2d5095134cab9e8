"""Into which blocks small clusters are best cut: small ones of keys where that costs nothing spare padding."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Precision

FINE_KEYS = 16  # keys of a small block
COARSE_QUERIES = 64  # queries of a block where keys are not cut finely


def cluster_blocks(q: Tensor, block_q: int, block_k: int, *, biased: bool, precision: Precision) -> tuple[int, int]:
    """Blocks of at most `block_q` x `block_k` tokens for clusters, as the back end that will run does them fastest.

    Each cluster's last block is padded. Where blocks of `FINE_KEYS` keys cost no more than larger ones of as many keys,
    keys are cut so and queries are not: that was the fastest on an H100 (`eval/bench_padding.py --time`).
    """
    if takes_fine_keys(q, biased=biased, precision=precision):
        return block_q, min(block_k, FINE_KEYS)
    return min(block_q, COARSE_QUERIES), block_k


def takes_fine_keys(q: Tensor, *, biased: bool, precision: Precision) -> bool:
    """Whether blocks of `FINE_KEYS` keys cost the back end that will run no more than larger ones of as many keys.

    So it is on a CPU, which gathers keys anyway, and for the Hopper kernel, which lays eight such blocks side by side
    in one tile. Elsewhere a block is a tile of its own, and matrix units stand idle in a narrow one.
    """
    if q.device.type == "cpu":
        return True
    if not q.is_cuda or torch.version.hip or torch.cuda.get_device_capability(q.device) != (9, 0):
        return False
    return not biased and precision == "as given" and q.element_size() == 2 and 32 < q.shape[3] <= 128
