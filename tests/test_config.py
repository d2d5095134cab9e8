"""Settings are refused at the door with the field, the range and the nearest spelling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import dit_accel
from dit_accel.config import Recipe, TopKSelect, WithinSelect, build, read_file, write_file
from dit_accel.errors import ConfigError
from dit_accel.layout import Grid, Text, TokenLayout
from dit_accel.pipelines.cli import parse_overrides
from dit_accel.sparsity.recipes import resolve

BAD: list[tuple[Any, dict[str, Any], str]] = [
    ("grta", {}, "no recipe is called 'grta'. Did you mean 'grat'?"),
    ("zzz", {}, "Known: adaspa, agent, auto"),
    ("grat", {"densty": 0.2}, "unknown setting 'densty'. Did you mean 'density'?"),
    ("grat", {"density": 2}, "density: input should be less than or equal to 1, got 2"),
    ("grat", {"density": 0}, "density: input should be greater than 0, got 0"),
    ("draft", {"density": float("nan")}, "density: input should be a finite number, got nan"),
    ("draft", {"density": "much"}, "density: input should be a valid number"),
    ("draft", {"radius": 1}, "unknown setting 'radius'"),
    ("draft", {"every": True}, "every: input should be a valid integer, got True"),
    ("draft", {"every": 0}, "every: input should be greater than or equal to 1, got 0"),
    ("draft", {"block_q": 100}, "block_q: input should be 16, 32, 64 or 128, got 100"),
    ("draft", {"dense_steps": 1.5}, "dense_steps: input should be less than or equal to 1"),
    ("draft", {"dense_layers": -1}, "dense_layers: input should be greater than or equal to 0"),
    ("draft", {"picture": (1, 0, 8)}, "picture.1: input should be greater than or equal to 1, got 0"),
    ("draft", {"picture": (8, 8)}, "picture"),
    ("svg2", {"least": 2}, "least.all: input should be less than or equal to 1, got 2"),
    ("svg2", {"least": [0.1, 2]}, "least.heads.1: input should be less than or equal to 1, got 2"),
    ("svg2", {"least": []}, "least.heads: tuple should have at least 1 item"),
    ("sta", {"along": "w"}, "along must be empty"),
    ("draft", {"select": {"kind": "topk"}}, "no select is called 'topk'. Did you mean 'top-k'?"),
    ("draft", {"select": {"kind": "within"}}, "'within' measures distance"),
    ("grat", {"select": {"kind": "top-p"}}, "needs score 'pooled'"),
    ("dfs", {"key_run": 32}, "needs score {kind: pooled, weigh: true}"),
    ("draft", {"order": {"kind": "gilbert", "key_run": 32}}, "needs score {kind: pooled, weigh: true}"),
    ("grat", {"order": {"kind": "hilbert", "key_run": 16}, "select": {"kind": "band"}}, "goes by the places of"),
    ("hilbert-ear", {"key_run": 48}, "key_run: input should be 0, 16, 32 or 64, got 48"),
    ({"name": "a", "order": {"kind": "tiel"}}, {}, "no order is called 'tiel'. Did you mean 'tile'?"),
    ({"name": "a", "order": {"kind": "tile", "pictur": [1, 2, 3]}}, {}, "Did you mean 'picture'?"),
    (
        "draft",
        {"order": "hilbrt"},
        "order: expected {kind: ...}, one of axes, gilbert, hilbert, importance, kmeans, raster, "
        "tile, got 'hilbrt'. Did you mean {kind: hilbert}?",
    ),
    ("draft", {"order": {"knd": "tile"}}, "tile, got {'knd': 'tile'}. Did you mean {kind: tile}?"),
    ("draft", {"order": {"picture": [1, 2, 3]}}, "order: expected {kind: ...}, one of axes, gilbert, "),
    ("draft", {"correct": 3}, "correct: expected {kind: ...}, one of centroids, delta, pooled-mass, residual, got 3."),
    (
        "sta",
        {"search": {"options": [{"select": "topk"}]}},
        "search.options.0.select: expected {kind: ...}, one of agents, ",
    ),
    ("draft", {"keeps": "own"}, "keeps: expected a mapping of settings, got 'own'"),
    (
        {"base": "draft", True: 1},
        {},
        "named by words, got True (YAML reads a bare on, off, yes or no as true or false)",
    ),
    ({"name": "a", 1: 2}, {}, "recipe: settings are named by words, got 1."),
    ({"name": ""}, {}, "name: string should have at least 1 character"),
    ({"nam": "a"}, {}, "unknown setting 'nam'. Did you mean 'name'?"),
    ({"base": "drafd"}, {}, "Did you mean 'draft'?"),
    ("missing.yaml", {}, "missing.yaml: cannot be read (No such file or directory)"),
    (3, {}, "expected a name, a file, a mapping or a Recipe, got int"),
]


@pytest.mark.parametrize(("recipe", "changes", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_settings_are_named(recipe: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(recipe, **changes)
    assert message in str(error.value)


def test_good_settings_beside_the_bad_ones() -> None:
    assert resolve("grat").name == "grat-x"
    assert resolve("grat", density=0.2).select == TopKSelect(density=0.2)
    assert resolve("draft", density=0.2, picture=[1, 4, 4]).density == 0.2
    assert resolve({"base": "draft", "name": "mine", "density": 0.4}).name == "mine"
    assert resolve("balanced", density=None) == resolve("balanced")


def test_none_is_a_value_for_what_may_be_none() -> None:
    assert resolve("hilbert-ear").correct is not None
    assert resolve("hilbert-ear", correct=None, density=0.5).correct is None
    assert resolve("hilbert-ear", **parse_overrides(0.5, ["correct=null"])).correct is None
    with pytest.raises(ConfigError, match="dense_steps"):
        resolve("hilbert-ear", dense_steps=None)


def test_configs_are_frozen_hashable_and_printable() -> None:
    recipe = resolve("draft")
    with pytest.raises(ValueError, match="frozen"):
        Recipe.__setattr__(recipe, "every", 3)
    assert hash(recipe) == hash(resolve("draft"))
    assert "draft" in str(recipe)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.parametrize("name", dit_accel.recipes())
def test_files_round_trip(tmp_path: Path, name: str, suffix: str) -> None:
    recipe, path = resolve(name), tmp_path / f"recipe{suffix}"
    write_file(recipe, path)
    assert resolve(path) == resolve(str(path)) == recipe
    assert build(Recipe, json.loads(recipe.model_dump_json()), "copy") == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "expected a mapping of settings, got list"),
        ("a: [", "is no valid YAML"),
        ("!!python/object/apply:os.system ['true']", "is no valid YAML"),
        ("x" * (2 << 20), "larger than 1 MiB"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_file(path)


def test_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_file(path)


def test_recipe_file_may_name_a_base(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(yaml.safe_dump({"base": "grat-b", "name": "mine", "radius": 2}))
    recipe = resolve(path, dense_layers=1)
    assert isinstance(recipe.select, WithinSelect)
    assert (recipe.name, recipe.select.radius, recipe.dense_layers) == ("mine", 2, 1)


@pytest.mark.parametrize(("first", "second"), [("a.yaml", "a.yaml"), ("b.yaml", "a.yaml")])
def test_a_file_that_is_its_own_base_is_named(tmp_path: Path, first: str, second: str) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"base": str(tmp_path / first), "name": "mine"}))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({"base": str(tmp_path / second), "name": "mine"}))
    with pytest.raises(ConfigError, match=r"a\.yaml: is its own base"):
        resolve(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either"),
        ({"grid": (1, 4, 4), "segments": [Grid(1, 4, 4)]}, "either"),
        ({"grid": (4, 4)}, "expected (frames, height, width)"),
        ({"grid": (1, 0, 4)}, "at least 1"),
        ({"grid": (1, 4, 4), "text": -1}, "0 or more"),
        ({"segments": [Text(4)]}, "at least one Grid"),
        ({"segments": [Text(0), Grid(1, 1, 1)]}, "at least 1"),
        ({"grid": (1, 4, 4), "text": 1.5}, "TokenLayout.text: expected a whole number, got 1.5"),
        ({"grid": (1, 16.5, 16)}, "expected (frames, height, width) as three whole numbers, got (1, 16.5, 16)"),
        ({"grid": "a"}, "as three whole numbers, got 'a'"),
        ({"grid": 5}, "as three whole numbers, got 5"),
        ({"segments": [Grid(1, 4, 4)], "text": 5}, "`text` and `text_first` go with `grid`"),
        ({"segments": [Grid(1, 4, 4)], "text_first": False}, "`text` and `text_first` go with `grid`"),
        ({"segments": [Text(1.5), Grid(1, 4, 4)]}, "TokenLayout: Text(length=1.5): expected a whole number, got 1.5"),
        ({"segments": 5}, "expected a sequence of Text, Grid and Pad, got 5"),
        ({"segments": [3, Grid(1, 4, 4)]}, "a segment is a Text, Grid or Pad, got 3"),
        ({"segments": [Grid(1, 4, 4), "ab"]}, "a segment is a Text, Grid or Pad, got 'ab'"),
    ],
)
def test_bad_layouts_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        TokenLayout(**arguments)
    assert message in str(error.value)


def test_good_layouts() -> None:
    first = TokenLayout(grid=(1, 4, 6), text=5)
    last = TokenLayout(grid=(1, 4, 6), text=5, text_first=False)
    assert first == TokenLayout([Text(5), Grid(1, 4, 6)])
    assert (first.length, first.text, first.main.shape) == (29, 5, (1, 4, 6))
    assert [start for start, _ in last.spans()] == [0, 24]
    assert str(last) == "1x4x6 + 5 text"
    assert hash(first) != hash(last)


def test_demo_model_names_are_checked() -> None:
    with pytest.raises(ConfigError, match="no model is called 'emoji-flx'"):
        dit_accel.demo_model("emoji-flx")


@pytest.mark.parametrize(
    ("name", "order", "corrected"),
    [("my_recipe", "hilbert", False), ("means_of_tiles", "tile", False), ("clusters_kept", "kmeans", True)],
)
def test_the_example_recipes_load_and_round_trip(name: str, order: str, corrected: bool, tmp_path: Path) -> None:
    recipe = resolve(Path(__file__).parent.parent / "examples" / f"{name}.yaml")
    assert recipe.order.kind == order
    assert (recipe.correct is not None) == corrected
    write_file(recipe, tmp_path / "copy.yaml")
    assert resolve(tmp_path / "copy.yaml") == recipe
