"""Axis 5, correct: what stands for the pairs that a plan does not compute.

A correction is either a further branch, merged by its log-sum-exp, or a *fix*: a change of the merged output. Both are
made from the queries, keys and values of the very call, also where the selection is an older one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..config import Correct, DeltaCorrect, MassCorrect, ResidualCorrect
from ..errors import PlanError
from ..kernels.bits import as_mask
from ..kernels.blend import blend
from ..kernels.pooled import WHOLE, pooled_attention
from .content import text_tokens
from .cut import Cut, Side
from .inputs import Inputs
from .plan import Branch, Operands, Plan, Result, from_units
from .scores import grid_means, grid_means_of_two, grid_weights

MEASURES = "a full step measures what is missing"  # why a call of a recipe that corrects by residuals is not sparse


def corrected(plan: Plan, config: Correct | None, cut: Cut, mask: torch.Tensor, inputs: Inputs) -> Plan:
    """Add a correction to a plan; `mask` bool [B|1, H|1, query units, key units], or as bits, says what it computes."""
    if config is None or isinstance(config, ResidualCorrect):  # the latter needs what its planner keeps
        return plan
    if isinstance(config, DeltaCorrect):
        return replace(plan, fixes=(*plan.fixes, delta(cut.q, cut.length, config.stride)))
    if isinstance(config, MassCorrect):
        return replace(plan, fixes=(*plan.fixes, pooled_mass(cut, as_mask(mask)[..., : cut.k.units], inputs)))
    return replace(plan, pooled=(*plan.pooled, centroids(cut, mask, inputs)))


# Centroids ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class PooledBranch:
    """The skipped key units, each as its mean key and value, for the queries that skip them: see `pooled_attention`."""

    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor
    computed: torch.Tensor
    row: torch.Tensor
    first: int

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.k, self.v, self.bias, self.computed, self.row))

    def run(self, given: Operands, into: Result | None = None) -> Result:
        """Return out [B, S, H, D] and lse [B, H, S]."""
        means = (self.k, self.v, self.bias, self.computed, self.row)
        return pooled_attention(given.q, *means, given.scale, first=self.first, into=into)


def centroids(cut: Cut, mask: torch.Tensor, inputs: Inputs) -> PooledBranch:
    """Let each query attend to the mean key and value of every unit it skips, with ln(tokens) on the logit.

    SVG-EAR, arXiv 2603.08982. The keys are those of this call, so the means follow them where the selection is reused.
    """
    keys = cut.k.without_means()
    means_k, means_v = grid_means_of_two(keys, inputs.k, inputs.v, WHOLE)
    if keys.span is None:
        mask = keys.on_grid(as_mask(mask), -1)
    return PooledBranch(
        k=means_k,
        v=means_v,
        bias=keys.grid_log_weights,
        computed=mask,
        row=cut.q.unit_of_token(cut.length),
        first=keys.span[0] if keys.span is not None else 0,
    )


# Pooled mass -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Blend:
    """Scale the output by `kept` [B, H, units] and add `rest` [B, H, units, D], each query by its unit."""

    kept: torch.Tensor
    rest: torch.Tensor
    unit: torch.Tensor

    def apply(self, out: torch.Tensor, lse: torch.Tensor, given: Operands) -> torch.Tensor:
        """Return the changed output, [B, S, H, D]."""
        return blend(out, self.kept, self.rest, self.unit)


def pooled_mass(cut: Cut, mask: torch.Tensor, inputs: Inputs) -> Blend:
    """Scale by the pooled attention of what was computed; mean values stand for the units worth compensating.

    Rectified SpaAttn (Liu et al. 2025): pooled queries against pooled picture keys, each counted by its tokens, and the
    text keys one by one. A skipped unit is compensated where the size of its pooled logit exceeds what pooling may
    have cost it, |mean|dq| k| + |q mean|dk||; the mass of the others stays with the computed ones. Text rows are exact.
    """
    cut = cut.at_rest()
    q, k, v = grid_means(cut.q, inputs.q), grid_means(cut.k, inputs.k), grid_means(cut.k, inputs.v)
    products = q @ k.mT
    logits = products * inputs.scale + grid_weights(cut.k)[..., None, :].log()
    text = _text_logits(cut.k, q, inputs)
    share = torch.cat([logits, text], -1).softmax(-1)[..., : k.shape[2]]
    spread_q, spread_k = _spread(cut.q, inputs.q, q), _spread(cut.k, inputs.k, k)
    cost = (spread_q @ k.mT).abs() + (q @ spread_k.mT).abs()
    skipped = ~mask[..., cut.q.grid[:, None], cut.k.grid]
    stands = share * (skipped & (products.abs() > cost))
    b, h, _, d = q.shape
    kept = torch.ones(b, h, cut.q.units, device=q.device)
    rest = torch.zeros(b, h, cut.q.units, d, device=q.device)
    kept[:, :, cut.q.grid] = 1 - stands.sum(-1)
    rest[:, :, cut.q.grid] = stands @ v
    return Blend(kept, rest, cut.q.unit_of_token(cut.length))


def _text_logits(side: Side, q: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Return the logits of mean queries to each text key, [B, H, units, text tokens]; padding has -inf."""
    words = text_tokens(inputs.layout, q.device)
    logits = q @ inputs.k[:, words].permute(0, 2, 3, 1).float() * inputs.scale
    return logits if inputs.bias is None else logits + inputs.bias[..., words][:, :, None]


def _spread(side: Side, x: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Return each grid unit's mean absolute difference from its mean, channel by channel, [B, H, units, D]."""
    return grid_means(side, x, means, "apart")


# Delta -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Delta:
    """Compute the queries `rows` [B|1, H|1, groups] in full, and move the group of each by the same difference."""

    rows: torch.Tensor
    group: torch.Tensor

    def apply(self, out: torch.Tensor, lse: torch.Tensor, given: Operands) -> torch.Tensor:
        """Return the changed output, [B, S, H, D]."""
        b, s, h, d = out.shape
        rows = self.rows.expand(b, h, -1)[..., None].expand(-1, -1, -1, d)
        mask = None if given.bias is None else given.bias[:, :, None].to(out.dtype)
        q, k, v = (x.transpose(1, 2) for x in (given.q, given.k, given.v))
        exact = torch.nn.functional.scaled_dot_product_attention(
            q.gather(2, rows), k, v, attn_mask=mask, scale=given.scale
        )
        moved = exact - out.transpose(1, 2).gather(2, rows)
        group = self.group.expand(b, h, s)[..., None].expand(-1, -1, -1, d)
        return out + moved.gather(2, group).transpose(1, 2)


def delta(side: Side, length: int, stride: int) -> Delta:
    """Compute one query in `stride` in full (at least one a block) and move its neighbours by the same difference.

    Delta Attention, Willette et al. 2025, arXiv 2505.11254, along the token order of a causal model; here along the
    order in which the queries lie in blocks.
    """
    return _fixed_delta(side, length, stride) if side.per else _delta(side, length, stride)


@lru_cache(maxsize=64)
def _fixed_delta(side: Side, length: int, stride: int) -> Delta:
    """Remember the groups of a side that depends on the layout alone."""
    return _delta(side, length, stride)


def _delta(side: Side, length: int, stride: int) -> Delta:
    step = next(n for n in range(min(stride, side.block), 0, -1) if side.block % n == 0)
    grouped = side.slots.unflatten(-1, (-1, step))
    rows = grouped[..., 0]  # holes lie at the end of a block, so a group without a first token has none
    ids = torch.arange(rows.shape[-1], device=rows.device).repeat_interleave(step)
    where = torch.where(side.slots < 0, length, side.slots).long()
    group = torch.zeros(*where.shape[:2], length + 1, dtype=torch.int64, device=rows.device)
    return Delta(rows.clamp(min=0).long(), group.scatter_(-1, where, ids.expand_as(where))[..., :length])


# Residual ----------------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class Missing:
    """What one site and branch keeps of its last full step: each query's computed share of attention, and the rest.

    `share` float32 [B, H, S], `rest` [B, S, H, D]; None until the full step has run.
    """

    step: int
    share: torch.Tensor | None = None
    rest: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.share, self.rest) if t is not None)


@dataclass(frozen=True, eq=False)
class Residual:
    """Measure what the plan misses (with `full`, the branches of every pair), or add what was measured."""

    missing: Missing
    growth: float
    full: tuple[Branch, ...] = ()

    def apply(self, out: torch.Tensor, lse: torch.Tensor, given: Operands) -> torch.Tensor:
        """Return the full output, or the computed one scaled and completed, [B, S, H, D]."""
        kept = self.missing
        if self.full:
            everything, whole = self.full[0].run(given)
            kept.share = (lse - whole).exp()
            kept.rest = everything - (kept.share.transpose(1, 2)[..., None] * out).to(out.dtype)
            return everything
        if kept.share is None or kept.rest is None:
            raise PlanError("residual: the full step that measures what is missing was planned but never ran.")
        kept.share = kept.share + self.growth
        return (kept.share.transpose(1, 2)[..., None] * out).to(out.dtype) + kept.rest


def residual(plan: Plan, config: ResidualCorrect, cut: Cut, missing: Missing, measure: bool) -> Plan:
    """Add the residual of the last full step, or make this step the full one.

    Re-ttention, Chen et al. 2025: out = share x sparse + rest, the share growing by `growth` a step. There after the
    output projection, with full attention maps; here before it, from the log-sum-exps of both.
    """
    if not measure:
        return replace(plan, fixes=(*plan.fixes, Residual(missing, config.growth)))
    everything = torch.ones(1, 1, cut.q.units, cut.k.units, dtype=torch.bool, device=cut.q.slots.device)
    whole = from_units(everything, cut)
    fix = Residual(missing, config.growth, whole.branches)
    return replace(plan, fixes=(*plan.fixes, fix), pairs=whole.pairs, measures=MEASURES)
