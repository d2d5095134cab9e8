"""Deliberate faults in the engine: for each one, a named test of this suite fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import test_attention
import test_hosts
import test_planner
import test_recipes
import test_report
import test_restore
import test_textkv
import test_video
import tiny
import torch

from dit_accel import api, attend
from dit_accel.hosts import cogvideox, generic, hunyuan_video, own, wan
from dit_accel.kernels.budget import reference as budget
from dit_accel.origin import Origin, Unchanged
from dit_accel.sparsity import decide, plan, planner, scores
from dit_accel.textkv import TextKV

Mutation = Callable[[pytest.MonkeyPatch], None]
Detector = Callable[[], None]


def swapped_heads(patch: pytest.MonkeyPatch) -> None:
    original = attend.run
    patch.setattr(attend, "run", lambda *args, **kwargs: original(*args, **kwargs).flip(2))


def shifted_index(patch: pytest.MonkeyPatch) -> None:
    original = plan.from_units

    def shifted(mask: torch.Tensor, *rest: Any) -> plan.Plan:
        return original(mask.roll(1, -1), *rest)

    patch.setattr(planner, "from_units", shifted)


def stale_plan(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(planner.Planner, "_still_good", lambda *_: True)


def state_survives_the_run(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(planner.Planner, "_forget_run", lambda self: None)


def dropped_text(patch: pytest.MonkeyPatch) -> None:
    original = decide.decide

    def without_text(recipe: Any, inputs: Any) -> decide.Decision:
        made = original(recipe, inputs)
        grid = torch.zeros(made.cut.k.units, dtype=torch.bool)
        grid[made.cut.k.grid] = True
        return replace(made, mask=made.mask & grid)

    patch.setattr(planner, "decide", without_text)


def wrong_scale(patch: pytest.MonkeyPatch) -> None:
    original = api.run
    patch.setattr(api, "run", lambda p, q, k, v, scale, bias: original(p, q, k, v, scale * 1.05, bias))


def wrong_scale_in_hosts(patch: pytest.MonkeyPatch) -> None:
    original = attend.run
    patch.setattr(attend, "run", lambda p, q, k, v, scale, bias: original(p, q, k, v, scale * 1.05, bias))


def forgotten_padding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(generic, "key_bias", lambda mask, keys: (None, ""))


def unrotated_keys(patch: pytest.MonkeyPatch) -> None:
    original = attend.run
    patch.setattr(attend, "run", lambda p, q, k, v, s, b: original(p, q, k.roll(1, 1), v, s, b))


def transposed_scores(patch: pytest.MonkeyPatch) -> None:
    original = scores.pooled
    patch.setattr(scores, "pooled", lambda *args: original(*args).transpose(-1, -2))


def worst_instead_of_best(patch: pytest.MonkeyPatch) -> None:
    original = budget.prefer_kept
    patch.setattr(budget, "prefer_kept", lambda s, k: original(-s, k))


def nan_is_ignored(patch: pytest.MonkeyPatch) -> None:
    original = scores.pooled
    patch.setattr(scores, "pooled", lambda *args: original(*args).nan_to_num(0))


def batch_shares_the_first_plan(patch: pytest.MonkeyPatch) -> None:
    original = decide.decide

    def first_only(recipe: Any, inputs: Any) -> decide.Decision:
        made = original(recipe, inputs)
        return replace(made, mask=made.mask[:1])

    patch.setattr(planner, "decide", first_only)


def sparse_counted_as_dense(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plan.Plan, "density", lambda self: torch.ones(()))


def forgotten_processor(patch: pytest.MonkeyPatch) -> None:
    from dit_accel.attachment import Attachment

    patch.setattr(Attachment, "detach", lambda self: self._undo.clear())


def call_is_not_changed_by_stages(patch: pytest.MonkeyPatch) -> None:
    original = attend.attend

    def without_stages(call: Any, engine: Any) -> torch.Tensor:
        stages, engine.stages = engine.stages, ()
        try:
            return original(call, engine)
        finally:
            engine.stages = stages

    patch.setattr(own, "attend", without_stages)


def stale_text_keys(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Unchanged, "holds_for", lambda self, tensors: len(tensors) == len(self._marks))


def text_keys_forget_the_branch(patch: pytest.MonkeyPatch) -> None:
    original = TextKV.get

    def one_branch(self: TextKV, site: Any, step: Any, *rest: Any) -> Any:
        return original(self, site, replace(step, branch="0"), *rest)

    patch.setattr(TextKV, "get", one_branch)


def text_keys_survive_the_run(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TextKV, "clear", lambda self: None)


def writes_to_weights_go_unseen(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Origin, "through", lambda self, *modules: self)


def picture_tokens_dropped(patch: pytest.MonkeyPatch) -> None:
    original = wan._text_kv
    patch.setattr(wan, "_text_kv", lambda attn, words: original(attn, words)[:2])


def padded_text_attended(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hunyuan_video, "key_bias", lambda mask, keys: (None, ""))


def text_length_of_another_prompt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hunyuan_video, "_valid", lambda mask, memo: 2)


def text_turned_with_the_video(patch: pytest.MonkeyPatch) -> None:
    original = cogvideox.ROTATION.turn

    def shifted(x: torch.Tensor, rotary: Any) -> torch.Tensor:
        words = x.shape[1] - rotary[0].shape[0]
        return original(x.roll(words, 1), rotary).roll(-words, 1)

    patch.setattr(cogvideox, "ROTATION", replace(cogvideox.ROTATION, turn=shifted))


LAYOUT = test_recipes.LAYOUTS[0]
MUTANTS: list[tuple[Mutation, Detector]] = [
    (swapped_heads, lambda: test_hosts.test_kernel_on_every_pair_is_stock_within_rounding("flux")),
    (shifted_index, lambda: test_recipes.test_grat_keeps_the_groups_its_paper_names(LAYOUT, "grat-b", 1)),
    (
        stale_plan,
        lambda: test_planner.test_nothing_stale_is_used({"step": test_planner.StepInfo(1, 5, 8, "cond")}),
    ),
    (state_survives_the_run, test_planner.test_a_new_run_frees_the_old_ones_state),
    (dropped_text, lambda: test_recipes.test_text_is_never_dropped("draft", LAYOUT)),
    (wrong_scale, test_attention.test_scale_and_bias_reach_the_kernel),
    (wrong_scale_in_hosts, lambda: test_hosts.test_kernel_on_every_pair_is_stock_within_rounding("flux")),
    (wrong_scale_in_hosts, lambda: test_hosts.test_kernel_on_every_pair_is_stock_within_rounding("wan")),
    (wrong_scale_in_hosts, lambda: test_hosts.test_kernel_on_every_pair_is_stock_within_rounding("sd3")),
    (forgotten_padding, lambda: test_hosts.test_kernel_on_every_pair_is_stock_within_rounding("qwen_image")),
    (unrotated_keys, lambda: test_hosts.test_kernel_on_every_pair_is_stock_within_rounding("flux")),
    (transposed_scores, lambda: test_recipes.test_draft_keeps_the_percentile_its_paper_names(LAYOUT, 0.5)),
    (
        worst_instead_of_best,
        lambda: test_recipes.test_draft_keeps_the_percentile_its_paper_names(LAYOUT, 0.5),
    ),
    (nan_is_ignored, lambda: test_recipes.test_undecidable_tokens_are_computed_in_full(float("nan"))),
    (batch_shares_the_first_plan, lambda: test_hosts.test_batch_item_equals_itself_alone("flux")),
    (sparse_counted_as_dense, test_report.test_figures_add_up),
    (
        forgotten_processor,
        lambda: test_restore.test_three_pipelines_restored_in_every_order((0, 1, 2), test_restore.three),
    ),
    (call_is_not_changed_by_stages, test_report.test_stages_run_before_the_plan),
    (stale_text_keys, lambda: test_textkv.test_a_prompt_changed_in_the_middle_is_seen("written to")),
    (stale_text_keys, lambda: test_textkv.test_a_prompt_changed_in_the_middle_is_seen("another tensor")),
    (text_keys_forget_the_branch, lambda: test_textkv.test_reused_keys_give_stock_bit_for_bit("wan")),
    (text_keys_survive_the_run, test_textkv.test_freed_by_the_next_run_and_by_restore),
    (writes_to_weights_go_unseen, lambda: test_textkv.test_weights_changed_in_the_middle_are_seen("to_k")),
    (picture_tokens_dropped, lambda: test_textkv.test_reused_keys_give_stock_bit_for_bit("wan_image")),
    (padded_text_attended, test_video.test_prompts_of_different_lengths_in_one_batch),
    (
        text_length_of_another_prompt,
        lambda: test_hosts.test_kernel_on_every_pair_is_stock_within_rounding("hunyuan_video"),
    ),
    (
        text_turned_with_the_video,
        lambda: test_hosts.test_kernel_on_every_pair_is_stock_within_rounding("cogvideox_rotary"),
    ),
]


@pytest.mark.parametrize(
    ("mutation", "detector"), MUTANTS, ids=[f"{i}-{m.__name__}" for i, (m, _) in enumerate(MUTANTS)]
)
def test_the_fault_is_caught(mutation: Mutation, detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    detector()
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        detector()


def test_tiny_pipelines_are_deterministic() -> None:
    """Without this, the detectors above could fail for no fault at all."""
    pipe, call = tiny.flux()
    assert torch.equal(tiny.generate(pipe, call), tiny.generate(pipe, call))
