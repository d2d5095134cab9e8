"""The committed rankings are of the recipes as they stand.

Where a definition is changed on purpose, the ranking is made anew, or what differs is named here and said in the
ranking's document. A rule that changes under the same settings is not seen here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from dit_accel.eval.candidates import definition_of, sparse_candidates
from dit_accel.eval.modelled import RESULTS
from dit_accel.eval.store import load
from dit_accel.sparsity.recipes import resolve

Definitions = dict[str, dict[str, Any]]
DENSITIES = (0.5, 0.3, 0.2, 0.1)


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Name the settings that differ, one level down where both are of one kind; where a recipe is from is none."""
    found = set()
    for key in ({*then, *now}) - {"sources"}:
        a, b = then.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping) and a.get("kind") == b.get("kind"):
            found |= {f"{key}.{inner}" for inner in {*a, *b} if a.get(inner) != b.get(inner)}
        elif a != b:
            found.add(key)
    return found


def definitions(name: str) -> tuple[Definitions, Definitions]:
    """Return what the candidates of a committed file were, and what those of the same study are today."""
    setup, rows = load(RESULTS / f"{name}.jsonl.xz")
    ours = [row for row in rows if row.family in ("recipe", "oracle")]
    assert {row.asked for row in ours} - {None} == set(DENSITIES)
    today = sparse_candidates(["all"], DENSITIES, setup.dense_steps, setup.dense_layers)
    then = {row.candidate: dict(row.definition) for row in ours}
    assert all(row.definition == then[row.candidate] for row in ours)
    return then, {one.name: json.loads(json.dumps(one.definition)) for one in today}


@pytest.mark.parametrize("name", ["eval_emoji-flux_h200", "eval_emoji-wan_h200"])
def test_rankings_are_of_todays_recipes(name: str) -> None:
    then, now = definitions(name)
    assert set(then) == set(now)
    assert len(then) > 100
    assert {one: found for one in then if (found := differing(then[one], now[one]))} == {}


def test_a_changed_setting_is_seen() -> None:
    then, _ = definitions("eval_emoji-flux_h200")
    draft = then["draft@0.3"]
    assert differing(draft, {**draft, "sources": []}) == set()
    assert differing(draft, {**draft, "block_q": 1}) == {"block_q"}
    assert differing(draft, {**draft, "order": {**draft["order"], "packed": False}}) == {"order.packed"}
    assert differing(draft, {**draft, "order": {"kind": "raster"}}) == {"order"}


def test_what_papers_do_with_text_is_said_only_of_those_who_do_it() -> None:
    file = {"name": "own", "base": "sparge", "faithful": True}
    assert {"text", "faithful"}.isdisjoint(definition_of(resolve("sparge")))
    assert definition_of(resolve(file)).items() >= {"text": "ranked", "faithful": True}.items()
