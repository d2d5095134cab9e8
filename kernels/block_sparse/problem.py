"""What the door hands to a back end: one checked call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Precision = Literal["as given", "int8"]


@dataclass(frozen=True)
class Predicate:
    """A closed-form rule which token pairs of a partial block may attend, in token coordinates.

    `q_coords` [3, Sq] and `k_coords` [3, Sk] are int32 and indexed by original token; d_a is the difference
    of a query's and a key's coordinate on axis a.

    - box: |d_a| <= radius_a on all three axes
    - disk: |d_0| <= radius_0 and d_1² + d_2² <= radius_1² (radius_2 is not read)
    - band: |d_0| <= radius_0 (radius_1 and radius_2 are not read)
    """

    kind: Literal["box", "disk", "band"]
    radius: tuple[int, int, int]
    q_coords: Tensor
    k_coords: Tensor


@dataclass(frozen=True)
class Problem:
    """One checked call of `block_sparse_attention`; its fields are that function's arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    index: Tensor
    count: Tensor
    block_q: int
    block_k: int
    full_count: Tensor | None
    q_order: Tensor | None
    k_order: Tensor | None
    key_bias: Tensor | None
    predicate: Predicate | None
    scale: float
    every_query: bool = False
    pack: bool = True
    precision: Precision = "as given"

    @property
    def splits(self) -> bool:
        """Whether some block may be partial; passing `count` itself as `full_count` says that none is."""
        return (self.predicate is not None or self.k_order is not None) and self.full_count is not self.count

    @property
    def is_empty(self) -> bool:
        """Whether no output has any key to attend."""
        return self.q.numel() == 0 or self.k.shape[1] == 0 or self.index.numel() == 0
