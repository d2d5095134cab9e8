"""Deliberate faults in calibration and in what profiles become: for each one, a named test of this suite fails."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import test_calibration as calibration_tests
import test_calibration_rules as rule_tests
import test_profile as profile_tests
import torch
from test_calibration_rules import of_duo

from dit_accel.calibration import choose, measure, settle
from dit_accel.calibration.seen import Seen
from dit_accel.sparsity import decide, heads, planner, profiled

Mutation = Callable[[pytest.MonkeyPatch], None]


def heads_of_another_order(patch: pytest.MonkeyPatch) -> None:
    original = settle.choose
    patch.setattr(settle, "choose", lambda *args: original(*args)[::-1])


def price_with_the_wrong_sign(patch: pytest.MonkeyPatch) -> None:
    original = settle.choose
    patch.setattr(settle, "choose", lambda choice, losses, costs: original(choice, losses, -costs))


def budget_overspent(patch: pytest.MonkeyPatch) -> None:
    original = choose.spend
    patch.setattr(choose, "spend", lambda losses, costs, room: original(losses, costs, 1.5 * room))


def any_head_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(choose, "LEFT_OUT", 1.0)


def prompts_averaged(patch: pytest.MonkeyPatch) -> None:
    class Averaging:
        mean, max = np.mean, np.mean

    patch.setattr(settle, "np", Averaging)


def text_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(measure, "_grid", lambda layout, device: torch.arange(layout.length, device=device))


def all_steps_in_one_window(patch: pytest.MonkeyPatch) -> None:
    original = Seen.of
    patch.setattr(Seen, "of", lambda self, site, window, windows: original(self, site, 0, (0.0,)))


def late_windows(patch: pytest.MonkeyPatch) -> None:
    original = profiled.Profiled.window
    patch.setattr(profiled.Profiled, "window", lambda self, share: max(original(self, share) - 1, 0))


def decisions_outlive_their_window(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(planner.Planner, "_fits", lambda self, recipe, kept, call: True)


def patterns_of_other_heads(patch: pytest.MonkeyPatch) -> None:
    original = heads.takers
    patch.setattr(heads, "takers", lambda given, device: original(given[::-1], device))


def queries_of_other_heads(patch: pytest.MonkeyPatch) -> None:
    original = decide.Inputs.of_heads
    patch.setattr(decide.Inputs, "of_heads", lambda self, at: original(self, self.q.shape[2] - 1 - at))


def floors_of_other_heads(patch: pytest.MonkeyPatch) -> None:
    original = decide._uploaded
    patch.setattr(decide, "_uploaded", lambda least, device: original(least[::-1], device))


MUTANTS: list[tuple[Mutation, Callable[[], None]]] = [
    (
        heads_of_another_order,
        lambda: calibration_tests.test_planted_patterns_are_found("svg1", "wan", ("f", "hw"), ({0}, {1}), {}),
    ),
    (price_with_the_wrong_sign, lambda: rule_tests.test_sparse_vdit_by_price(2.0, 1.0)),
    (
        budget_overspent,
        lambda: rule_tests.test_a_budget_over_the_heads_of_all_sites("duo", of_duo, 0.6, "wan"),
    ),
    (any_head_left_out, calibration_tests.test_heads_without_values_are_left_out_but_few),
    (prompts_averaged, lambda: rule_tests.test_floors_are_the_largest_of_any_prompt("wan")),
    (text_counted, lambda: rule_tests.test_floors_are_the_largest_of_any_prompt("flux")),
    (all_steps_in_one_window, lambda: rule_tests.test_floors_are_the_largest_of_any_prompt("wan")),
    (late_windows, profile_tests.test_windows_decide_anew_and_unseen_sites_follow_the_recipe),
    (
        decisions_outlive_their_window,
        profile_tests.test_windows_decide_anew_and_unseen_sites_follow_the_recipe,
    ),
    (patterns_of_other_heads, profile_tests.test_each_head_follows_its_number),
    (queries_of_other_heads, profile_tests.test_each_head_follows_its_number),
    (floors_of_other_heads, lambda: profile_tests.test_each_head_has_its_floor(None)),
]


@pytest.mark.parametrize(("mutation", "detector"), MUTANTS, ids=[m.__name__ for m, _ in MUTANTS])
def test_the_fault_is_caught(mutation: Mutation, detector: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    detector()
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        detector()
