"""Deliberate faults in the axes: for each one, a named test of this suite fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import test_cases
import test_faithful_agents as agent_tests
import test_faithful_content as content_tests
import test_faithful_heads as head_tests
import test_faithful_llm as llm_tests
import test_faithful_places as place_tests
import test_faithful_reuse as reuse_tests
import torch

from dit_accel.kernels import pooled
from dit_accel.kernels.descent import reference as descent
from dit_accel.kernels.merge import merge_attention
from dit_accel.kernels.top_mass import reference as top_mass
from dit_accel.sparsity import (
    agents,
    cached,
    content,
    correct,
    cut,
    decide,
    exact,
    expected,
    heads,
    lines,
    lowbit,
    planner,
    rows,
    scores,
    selectors,
    shapes,
)

Mutation = Callable[[pytest.MonkeyPatch], None]


def keys_sorted_worst_first(patch: pytest.MonkeyPatch) -> None:
    original = rows.key_mass
    patch.setattr(content.rows, "key_mass", lambda *args: -original(*args))


def text_columns_dropped(patch: pytest.MonkeyPatch) -> None:
    original = exact.exact_plan

    def without(*args: Any) -> Any:
        made = original(*args)
        shape, words = made.branches
        rows_of_text = words.count > words.count.amin()
        count, full = words.count * rows_of_text, words.full_count * rows_of_text
        return replace(made, branches=(shape, replace(words, count=count, full_count=full)))

    patch.setattr(planner, "exact_plan", without)


def window_not_moved_inside(patch: pytest.MonkeyPatch) -> None:
    original = shapes.window

    def loose(length: int, kernel: int, stride: int = 1, dilation: int = 1) -> Any:
        first, last, number = original(length, kernel, stride, dilation)
        return first - (first == first.min()), last - (first == first.min()), number

    patch.setattr(shapes, "window", loose)


def disk_of_the_wrong_size(patch: pytest.MonkeyPatch) -> None:
    original = exact._integer_radius
    patch.setattr(exact, "_integer_radius", lambda limit: original(limit + 1))


def band_too_wide(patch: pytest.MonkeyPatch) -> None:
    original = shapes._width
    patch.setattr(shapes, "_width", lambda *args: None if (w := original(*args)) is None else 2 * w)


def runs_of_queries_not_reversed(patch: pytest.MonkeyPatch) -> None:
    original = scores.runs_of
    patch.setattr(scores, "runs_of", lambda tiling, length, device, backwards=False: original(tiling, length, device))


def clusters_not_counted(patch: pytest.MonkeyPatch) -> None:
    original = scores.grid_weights
    patch.setattr(scores, "grid_weights", lambda side: torch.ones_like(original(side)))


def floor_forgotten(patch: pytest.MonkeyPatch) -> None:
    original = top_mass.first
    patch.setattr(top_mass, "first", lambda ordered, least: original(ordered, 0.0))


def neighbours_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decide, "adjacent", lambda tiling: np.zeros((tiling.units, tiling.units), dtype=bool))


def crossing_block_left_out(patch: pytest.MonkeyPatch) -> None:
    original = top_mass.mass_before

    def after(score: torch.Tensor) -> Any:
        order, before = original(score)
        return order, torch.nn.functional.pad(before[..., 1:], (0, 1), value=1.0)

    patch.setattr(top_mass, "mass_before", after)


def untrusted_units_judged_anyway(patch: pytest.MonkeyPatch) -> None:
    original = scores.likeness
    patch.setattr(scores, "likeness", lambda *args: torch.ones_like(original(*args)))


def heads_take_the_worst(patch: pytest.MonkeyPatch) -> None:
    original = heads._losses
    patch.setattr(heads, "_losses", lambda *args: [-loss for loss in original(*args)])


def heads_swapped(patch: pytest.MonkeyPatch) -> None:
    original = heads._pick
    patch.setattr(heads, "_pick", lambda choices, best: original(choices, best.flip(-1)))


def centroids_counted_backwards(patch: pytest.MonkeyPatch) -> None:
    original = pooled.pooled_attention
    patch.setattr(
        correct, "pooled_attention", lambda q, k, v, bias, *rest, **more: original(q, k, v, -bias, *rest, **more)
    )


def centroids_of_what_is_computed(patch: pytest.MonkeyPatch) -> None:
    original = correct.centroids
    patch.setattr(correct, "centroids", lambda cut, mask, inputs: original(cut, ~mask, inputs))


def mass_not_taken_off(patch: pytest.MonkeyPatch) -> None:
    original = correct.pooled_mass

    def unscaled(*args: Any) -> Any:
        blend = original(*args)
        return replace(blend, kept=torch.ones_like(blend.kept))

    patch.setattr(correct, "pooled_mass", unscaled)


def delta_of_the_wrong_sign(patch: pytest.MonkeyPatch) -> None:
    original = correct.Delta.apply
    patch.setattr(correct.Delta, "apply", lambda self, out, lse, given: 2 * out - original(self, out, lse, given))


def stale_decision(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(planner.Planner, "_still_good", lambda *_: True)


def layers_decide_for_all_transformers(patch: pytest.MonkeyPatch) -> None:
    original = planner._decider
    patch.setattr(planner, "_decider", lambda recipe, site: original(recipe, replace(site, model="")))


def centroids_shared_by_branches(patch: pytest.MonkeyPatch) -> None:
    original = planner.Planner._by_content

    def merged(self: Any, recipe: Any, call: Any) -> Any:
        return original(self, recipe, replace(call, step=replace(call.step, branch="all")))

    patch.setattr(planner.Planner, "_by_content", merged)


def old_means_correct_the_new_call(patch: pytest.MonkeyPatch) -> None:
    memory: list[Any] = []
    original = correct.centroids

    def first(*args: Any) -> Any:
        memory.append(original(*args))
        return memory[0]

    patch.setattr(correct, "centroids", first)


def blocks_mix_units(patch: pytest.MonkeyPatch) -> None:
    original = cut.from_sorted

    def shifted(order: torch.Tensor, *rest: Any) -> Any:
        return original(order.roll(1, -1), *rest)

    patch.setattr(content, "from_sorted", shifted)


def cases_ignored(patch: pytest.MonkeyPatch) -> None:
    from dit_accel.config import Case

    patch.setattr(Case, "holds", lambda *_: False)


def undecided_heads_choose(patch: pytest.MonkeyPatch) -> None:
    original = heads._losses
    patch.setattr(heads, "_losses", lambda *args: [loss.nan_to_num(0) for loss in original(*args)])


def clusters_found_apart(patch: pytest.MonkeyPatch) -> None:
    from dit_accel.kernels.kmeans import kmeans

    def apart(q: Any, k: Any, counts: Any, iterations: int, start: Any) -> Any:
        return kmeans(q, counts[0], iterations), kmeans(k, counts[1], iterations)

    patch.setattr(content, "cocluster", apart)


def tree_reads_the_next_key(patch: pytest.MonkeyPatch) -> None:
    original = descent._descended
    patch.setattr(descent, "_descended", lambda queries, keys, *rest: original(queries, keys.roll(-1, 2), *rest))


def nothing_is_rounded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lowbit, "rounded", lambda x, bits: x)


def reference_over_everything(patch: pytest.MonkeyPatch) -> None:
    original = lowbit._reference
    patch.setattr(lowbit, "_reference", lambda scene, v, keep: original(scene, v, torch.ones_like(keep)))


def threshold_not_in_logarithms(patch: pytest.MonkeyPatch) -> None:
    original = selectors.threshold
    patch.setattr(selectors, "threshold", lambda score, keep, above: original(score.exp(), keep, above))


def doubtful_heads_are_trusted(patch: pytest.MonkeyPatch) -> None:
    original = heads._trusted
    patch.setattr(heads, "_trusted", lambda limit, apart: 1 - original(limit, apart))


def slashes_not_divided_by_their_count(patch: pytest.MonkeyPatch) -> None:
    original = lines.displacements

    def alike(*args: Any) -> Any:
        ids, pairs, queries = original(*args)
        return ids, pairs, torch.ones_like(queries)

    patch.setattr(lines, "displacements", alike)


def log_sum_exps_never_kept(patch: pytest.MonkeyPatch) -> None:
    original = cached.score
    patch.setattr(cached, "score", lambda scene, before: original(scene, None))


def log_sum_exps_outlive_the_run(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(planner.Planner, "_forget_run", lambda self: None)


def every_layer_decides(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(planner, "_decider", lambda recipe, site: site.name)


def budget_forgotten(patch: pytest.MonkeyPatch) -> None:
    original = heads._price
    patch.setattr(heads, "_price", lambda losses, computed, budget: original(losses, computed, 0.9))


def agents_weigh_wrongly(patch: pytest.MonkeyPatch) -> None:
    original = agents.Agents.run

    def heavier(self: Any, given: Any, into: Any) -> Any:
        out, lse = original(self, given)
        return merge_attention((into[0], out), (into[1], lse + 1))

    patch.setattr(agents.Agents, "run", heavier)


def agents_listen_to_the_next_cell(patch: pytest.MonkeyPatch) -> None:
    original = agents._cells

    def shifted(*args: Any) -> Any:
        order, cell = original(*args)
        return order, (cell + 1) % (cell.max() + 1) * (cell >= 0) - (cell < 0)

    patch.setattr(agents, "_cells", shifted)


def own_value_taken_off(patch: pytest.MonkeyPatch) -> None:
    original = agents.Agents.run
    patch.setattr(agents.Agents, "run", lambda self, *given: original(replace(self, value=-self.value), *given))


PICTURE, VIDEO = place_tests.LAYOUTS[0], place_tests.LAYOUTS[1]
GOLD = place_tests.NATTEN[0]
MUTANTS: list[tuple[Mutation, Callable[[], None]]] = [
    (keys_sorted_worst_first, lambda: content_tests.test_pbs(PICTURE, 0)),
    (text_columns_dropped, lambda: place_tests.test_clear(PICTURE, 2, 0)),
    (window_not_moved_inside, lambda: place_tests.test_windows_are_those_of_natten(GOLD)),
    (disk_of_the_wrong_size, lambda: place_tests.test_clear(PICTURE, 2, 0)),
    (band_too_wide, lambda: place_tests.test_radial(place_tests.TokenLayout(grid=(6, 6, 8), text=5), 0.25)),
    (runs_of_queries_not_reversed, lambda: content_tests.test_xattention(VIDEO, 0.9, 8)),
    (clusters_not_counted, lambda: content_tests.test_clusters("svg2", PICTURE, 0.5, 0.1)),
    (floor_forgotten, lambda: content_tests.test_jenga(VIDEO, 0.3, 0.25)),
    (crossing_block_left_out, lambda: content_tests.test_jenga(VIDEO, 0.6, 0.5)),
    (clusters_not_counted, lambda: content_tests.test_rectified_selection(PICTURE, 0.3, 0.2)),
    (floor_forgotten, lambda: content_tests.test_rectified_selection(VIDEO, 0.6, 0.4)),
    (neighbours_forgotten, lambda: content_tests.test_rectified_selection(PICTURE, 0.3, 0.2)),
    (untrusted_units_judged_anyway, lambda: content_tests.test_sparge(PICTURE, 0.7)),
    (heads_take_the_worst, head_tests.test_svg1_finds_the_axis_a_head_looks_along),
    (heads_swapped, head_tests.test_svg1_finds_the_axis_a_head_looks_along),
    (centroids_counted_backwards, lambda: head_tests.test_svg_ear_centroids(head_tests.LAYOUTS[0])),
    (centroids_of_what_is_computed, lambda: head_tests.test_svg_ear_centroids(head_tests.LAYOUTS[0])),
    (mass_not_taken_off, lambda: head_tests.test_rectified_pooled_mass(head_tests.LAYOUTS[0])),
    (delta_of_the_wrong_sign, lambda: head_tests.test_delta(head_tests.LAYOUTS[0], 4)),
    (stale_decision, test_cases.test_decisions_at_given_steps),
    (layers_decide_for_all_transformers, test_cases.test_two_transformers_share_no_decision),
    (centroids_shared_by_branches, test_cases.test_centroids_are_warm_within_a_run_only),
    (old_means_correct_the_new_call, test_cases.test_a_reused_selection_is_corrected_by_the_present_tensors),
    (blocks_mix_units, lambda: content_tests.test_clusters("svg2", PICTURE, 0.5, 0.1)),
    (cases_ignored, test_cases.test_cases_reach_the_calls),
    (clusters_found_apart, lambda: content_tests.test_clusters("svoo", PICTURE, 0.5, 0.1)),
    (tree_reads_the_next_key, lambda: llm_tests.test_hip(PICTURE, 4)),
    (nothing_is_rounded, lambda: llm_tests.test_sale_of_a_density(PICTURE)),
    (reference_over_everything, lambda: llm_tests.test_sale(PICTURE, 4, 0.2, False)),
    (threshold_not_in_logarithms, lambda: llm_tests.test_sale(PICTURE, 4, 0.2, False)),
    (doubtful_heads_are_trusted, lambda: llm_tests.test_flexprefill(PICTURE, 0.5)),
    (slashes_not_divided_by_their_count, lambda: llm_tests.test_flexprefill(PICTURE, 0.5)),
    (log_sum_exps_never_kept, lambda: reuse_tests.test_adaspa_reuses_the_log_sum_exps_of_its_first_search(PICTURE)),
    (
        log_sum_exps_outlive_the_run,
        lambda: reuse_tests.test_adaspa_reuses_the_log_sum_exps_of_its_first_search(PICTURE),
    ),
    (every_layer_decides, lambda: reuse_tests.test_tidal(reuse_tests.LAYOUTS[2])),
    (budget_forgotten, lambda: reuse_tests.test_moa(VIDEO, 0.5)),
    (heads_swapped, lambda: reuse_tests.test_duo(VIDEO, 0.5)),
    (agents_weigh_wrongly, lambda: agent_tests.test_agent(PICTURE, 0.125, 0.3, 0.075)),
    (agents_listen_to_the_next_cell, lambda: agent_tests.test_agent(PICTURE, 0.125, 0.3, 0.075)),
    (own_value_taken_off, lambda: agent_tests.test_agent(PICTURE, 0.125, 0.3, 0.075)),
    (undecided_heads_choose, lambda: head_tests.test_heads_that_cannot_tell_compute_everything(float("nan"))),
]


@pytest.mark.parametrize(("mutation", "detector"), MUTANTS, ids=[m.__name__ for m, _ in MUTANTS])
def test_the_fault_is_caught(mutation: Mutation, detector: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    _forget()
    detector()
    mutation(monkeypatch)
    _forget()
    try:
        with pytest.raises(AssertionError):
            detector()
    finally:
        _forget()


def _forget() -> None:
    """Plans of places are cached by layout: a fault would otherwise not be seen, or outlive its test."""
    from dit_accel.config import recipe

    shapes.unit_mask.cache_clear()
    expected.plan_note.cache_clear()
    decide._by_place.cache_clear()
    decide._grid_keep.cache_clear()
    decide.keep_mask.cache_clear()
    recipe._at.cache_clear()
