"""A recipe: one choice per axis, when it applies, and where other choices take its place."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..errors import ConfigError, nearest
from ..kernels.block_sparse import Precision
from .base import Block, Config, Count, Density, Share
from .check import build
from .correct import Correct
from .heads import HeadChoice
from .order import GilbertOrder, HilbertOrder, ImportanceOrder, KMeansOrder, Order, RasterOrder
from .score import GeometryScore, PooledScore, Score
from .select import Keeps, Select, TopKSelect

AXES = ("order", "score", "select", "keeps", "correct")
MAPPED = (*AXES, "heads", "precision", "every", "decide_at", "decide_layers", "block_q", "block_k")  # in a case
FIXED = ("all", "none")  # rules that would miss any density
EXACT = ("neighborhood", "disk")  # rules whose shape is exact to the token, not to the block
LATTICE = (*EXACT, "lines")  # rules that count tiles along the axes
PLACES = (*EXACT, "within", "radial", "agents")  # rules for places on a grid, where words have none


class Case(Config, frozen=True):
    """Other choices for some layers and steps: what is None stays as the recipe has it.

    `layers`: attention sites as a Python slice, "0:4", "-2:" or "1::3" (every third from the second on). `depth`: sites
    as first and last share of all, [0.0, 0.25) for instance, which fits models of any depth. `steps`: first and last
    share of the run, [0.2, 0.6) for instance. `name` is for the reader alone.
    """

    name: str | None = None
    layers: Annotated[str, Field(pattern=r"^-?\d*:-?\d*(:[1-9]\d*)?$")] | None = None
    depth: Annotated[tuple[Share, Share], Field(strict=False)] | None = None
    steps: Annotated[tuple[Share, Share], Field(strict=False)] | None = None
    order: Order | None = None
    score: Score | None = None
    select: Select | None = None
    keeps: Keeps | None = None
    correct: Correct | None = None
    heads: HeadChoice | None = None
    every: Count | None = None
    decide_at: Annotated[tuple[Share, ...], Field(strict=False)] | None = None
    decide_layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] | None = None
    block_q: Block | None = None
    block_k: Block | None = None
    precision: Precision | None = None

    def holds(self, site: int, sites: int, share: float) -> bool:
        """Say whether the case speaks for a site and a share of the run."""
        if self.steps is not None and not self.steps[0] <= share < self.steps[1]:
            return False
        if self.depth is not None and not self.depth[0] <= site / sites < self.depth[1]:
            return False
        if self.layers is None:
            return True
        start, stop, step = (int(part) if part else None for part in (self.layers + "::").split(":")[:3])
        return site in range(sites)[start:stop:step]

    @property
    def changes(self) -> dict[str, Any]:
        """The settings this case replaces."""
        return {name: value for name in MAPPED if (value := getattr(self, name)) is not None}


class Recipe(Config, frozen=True):
    """One sparse-attention method: a choice on each axis, and when it applies.

    `heads`: patterns among which each head chooses; it then replaces order, score and select. `search`: patterns among
    which a calibration chooses, until then the recipe's own axes hold (docs/calibration.md). `every`: sparse steps
    between two decisions; `decide_at`: shares of the run at which decisions are made instead; `drift`: a sample decides
    again the step after its queries and keys moved by more than this share of their length instead. `decide_layers`:
    the attention sites that decide, the others take over the decision of the last of them. `dense_steps`: share of the
    first steps left dense. `dense_layers`: first layers left dense. `block_q`, `block_k`: largest kernel tile.
    `precision`: the numbers in which queries meet keys, "int8" or as given. `text`: what the papers do with text, which
    `faithful` carries out for comparison with them: "kept", as ever; "ranked" and dropped like a grid's tokens; or
    "skipped" by a head that skips the grid. Without `faithful` it is always computed. `cases`: other choices for some
    layers and steps, later ones win. `total`: what a mixture of densities was made to compute of all pairs after the
    dense steps; another density scales what its cases ask. `adaptive`: go dense where the measured table says that
    sparse would be slower (presets). `sources`: the papers.
    """

    name: Annotated[str, Field(min_length=1, max_length=64)]
    order: Order = RasterOrder()
    score: Score = GeometryScore()
    select: Select = TopKSelect()
    keeps: Keeps = Keeps()
    correct: Correct | None = None
    heads: HeadChoice | None = None
    search: HeadChoice | None = None
    cases: Annotated[tuple[Case, ...], Field(strict=False)] = ()
    every: Count = 1
    decide_at: Annotated[tuple[Share, ...], Field(strict=False)] = ()
    drift: Annotated[float, Field(gt=0, le=10, strict=False)] | None = None
    decide_layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] = ()
    dense_steps: Share = 0.2
    dense_layers: Annotated[int, Field(ge=0)] = 0
    block_q: Block = 128
    block_k: Block = 64
    precision: Precision = "as given"
    text: Literal["kept", "ranked", "skipped"] = "kept"
    faithful: bool = False
    total: Density | None = None
    adaptive: bool = False
    sources: Annotated[tuple[str, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _axes_fit(self) -> Recipe:
        for case in (self, *self.cases):  # a case alone in force; what several make together is checked when it is
            chosen = {name: getattr(case, name) or getattr(self, name) for name in (*AXES, "heads", "precision")}
            _check_choice(**chosen, search=self.search)
            if self.ranks_text:
                _check_ranked(chosen["score"], chosen["select"], chosen["heads"], self.search)
        if self.heads is not None and self.search is not None:
            raise ValueError("heads choose online, a search is done by calibration: name one of them")
        content = self.order.kind in ("importance", "kmeans")
        if self.drift is not None and (self.heads or self.search or content):
            raise ValueError("drift decides again for single samples, so all heads must lie in one order of places")
        if self.drift is not None and (self.decide_at or self.decide_layers):
            raise ValueError("drift, decide_at and decide_layers each say when to decide: name one")
        return self

    @property
    def density(self) -> float | None:
        """The asked density, None where the rule itself decides."""
        return self.total or (self.select.asked if self.heads is None else self.heads.asked)

    @property
    def mixture_note(self) -> str:
        """What the asked density of a mixture is a share of."""
        return f"{self.name} mixes recipes: density {self.total} is asked of all calls after the dense steps together"

    @property
    def faithful_note(self) -> str:
        """What a faithful recipe does with text."""
        does = {"kept": "kept", "ranked": "ranked and dropped like a grid's tokens", "skipped": "skipped with the grid"}
        return f"faithful: text is {does[self.text]}"

    @property
    def ranks_text(self) -> bool:
        """Whether words are ranked and dropped like the tokens of a grid."""
        return self.faithful and self.text == "ranked"

    @property
    def skips_text(self) -> bool:
        """Whether a head that skips the grid skips text too."""
        return self.faithful and self.text == "skipped"

    @property
    def content_driven(self) -> bool:
        """Whether the decision depends on the queries and keys."""
        chosen = isinstance(self.order, ImportanceOrder | KMeansOrder)
        return self.heads is not None or chosen or not (self.select.geometric or self.score.kind == "geometry")

    @property
    def reuses(self) -> bool:
        """Whether decisions are kept for later calls."""
        later = self.every > 1 or bool(self.decide_at) or bool(self.decide_layers) or self.drift is not None
        return self.content_driven and later

    @property
    def stateful(self) -> bool:
        """Whether anything is kept between calls."""
        residual = self.correct is not None and self.correct.kind == "residual"
        cached = self.score.kind == "mass" and self.score.cached
        return self.reuses or self.order.kind == "kmeans" or residual or cached

    def at(self, site: int, sites: int, share: float) -> Recipe:
        """Return the recipe as its cases make it at one site of `sites` and one share of the run."""
        return _at(self, site, sites, share) if self.cases else self

    def override(self, **changes: Any) -> Recipe:
        """Return a copy with settings replaced, by field name or by the name of a field of the chosen axes.

        `density` also turns a rule of fixed size or mass into the same rule for as many pairs as the density allows.
        Raises ConfigError on unknown names and impossible values.
        """
        data, asked = self.model_dump(), changes.pop("density", None)
        for key, value in changes.items():
            if key in data:
                data[key] = value if not isinstance(value, Config) else value.model_dump()
            else:
                owner = next((axis for axis in AXES if key != "kind" and key in (data[axis] or {})), None)
                if owner is None:
                    raise ConfigError(f"recipe {self.name!r}: unknown setting {key!r}.{nearest(key, self._settings())}")
                data[owner] = {**data[owner], key: value}
        made = build(Recipe, data, f"recipe {self.name!r}")
        return made if asked is None else build(Recipe, made._with_density(asked), f"recipe {self.name!r}")

    def _with_density(self, density: Any) -> dict[str, Any]:
        """Ask the selection, and those of all options and cases, for a density; a mixture for as much more or less."""
        data = self.model_dump()
        if self.total is not None:
            return {**data, **self._scaled(density), "total": density}
        out = {**data, "select": self.select.with_density(density)}
        for name, choice in (("heads", self.heads), ("search", self.search)):
            if choice is not None:
                out[name] = _choice_with_density(choice, density)
        out["cases"] = tuple(
            c.model_dump()
            if c.select is None or c.select.kind in FIXED
            else {**c.model_dump(), "select": c.select.with_density(density)}
            for c in self.cases
        )
        return out

    def _scaled(self, density: Any) -> dict[str, Any]:
        """Ask everything that names a density for as much more or less as `density` is than the total."""
        factor = asked_density(density, f"recipe {self.name!r}") / (self.total or 1.0)

        def scaled(part: Recipe | Case) -> dict[str, Any]:
            out = part.model_dump()
            if part.select is not None and part.select.asked is not None:
                out["select"] = part.select.with_density(min(1.0, part.select.asked * factor))
            if part.heads is not None and part.heads.asked is not None:
                out["heads"] = _choice_with_density(part.heads, min(1.0, part.heads.asked * factor))
            return out

        whole = scaled(self)
        return {name: whole[name] for name in ("select", "heads")} | {"cases": tuple(map(scaled, self.cases))}

    def _settings(self) -> list[str]:
        data = self.model_dump()
        inner = [key for axis in AXES for key in (data[axis] or {}) if key != "kind"]
        return sorted({*data, *inner, "density"})

    def __str__(self) -> str:
        axes = ", ".join(f"{axis}={value!r}" for axis in AXES if (value := getattr(self, axis)) is not None)
        when = f"every={self.every}, dense_steps={self.dense_steps:g}, dense_layers={self.dense_layers}"
        return f"{self.name}: {axes}, {when}"


class _Asked(Config, frozen=True):
    density: Density


def asked_density(value: Any, where: str) -> float:
    """Return a density as a number; raise ConfigError where it is none, or out of range."""
    return build(_Asked, {"density": value}, where).density


def _choice_with_density(choice: HeadChoice, density: Any) -> dict[str, Any]:
    data = choice.model_dump()
    if choice.budget is not None:
        return {**data, "budget": density}
    asked = []
    for option in choice.options:
        if option.select.kind not in FIXED:
            asked.append({**option.model_dump(), "select": option.select.with_density(density)})
        elif choice.trust is not None:  # where heads are trusted or not, both options are needed
            asked.append(option.model_dump())
    return {**data, "options": tuple(asked), "limit": None} if asked else data


@lru_cache(maxsize=4096)
def _at(recipe: Recipe, site: int, sites: int, share: float) -> Recipe:
    changes: dict[str, Any] = {}
    for case in recipe.cases:
        if case.holds(site, sites, share):
            changes |= case.changes
    return recipe.override(**changes, cases=(), total=None)


def _check_choice(
    order: Order,
    score: Score,
    select: Select,
    keeps: Keeps,
    correct: Correct | None,
    heads: HeadChoice | None,
    precision: Precision,
    search: HeadChoice | None,
) -> None:
    if heads is None:
        _check_axes(order, score, select, keeps)
    if select.kind == "agents" and precision != "as given":
        raise ValueError("select 'agents' goes through tokens that are computed as given, so precision must be too")
    patterns = heads or search
    for option in patterns.options if patterns else ():
        _check_axes(option.order, option.score, option.select, keeps, option=True)
    if correct is None:
        return
    if correct.kind == "pooled-mass" and score.kind != "pooled":
        raise ValueError("correct 'pooled-mass' scales by the pooled score, so it needs score 'pooled'")
    if patterns is not None and correct.kind not in ("delta", "residual"):
        raise ValueError("heads that choose among patterns can only be corrected by 'delta' or 'residual'")
    if select.kind == "agents":
        raise ValueError("select 'agents' computes no pairs that a correction could complete")


def _check_ranked(score: Score, select: Select, heads: HeadChoice | None, search: HeadChoice | None) -> None:
    options = [option for choice in (heads, search) if choice for option in choice.options]
    pairs = [(option.score, option.select) for option in options]
    for worth, rule in pairs if heads else [(score, select), *pairs]:
        if rule.kind in PLACES or not (rule.geometric or worth.kind != "geometry"):
            raise ValueError("text 'ranked' needs rules that words have part in, not places on a grid")


def _check_axes(order: Order, score: Score, select: Select, keeps: Keeps, option: bool = False) -> None:
    if select.kind == "within" and score.kind != "geometry":
        raise ValueError("select 'within' measures distance, so it needs score 'geometry'")
    if select.kind in ("top-p", "cumulative", "error") and score.kind in ("geometry", "low-bit"):
        raise ValueError(f"select {select.kind!r} adds up shares of a score, so it needs score 'pooled'")
    if select.kind == "threshold" and score.kind != "low-bit":
        raise ValueError("select 'threshold' holds a share of attention against a limit, so it needs score 'low-bit'")
    content = order.kind in ("importance", "kmeans")
    if isinstance(order, HilbertOrder | GilbertOrder) and order.key_run:
        _check_key_run(score, select, option)
    if select.kind == "lines" and (order.kind != "tile" or score.kind != "sampled"):
        raise ValueError("select 'lines' follows displacements of tiles, so it needs order 'tile' and score 'sampled'")
    if score.kind == "sampled" and order.kind == "kmeans":
        raise ValueError("score 'sampled' ranks keys alone, so the order cannot be 'kmeans'")
    if content and (select.geometric or score.kind == "geometry"):
        raise ValueError(f"order {order.kind!r} follows the content, so select and score must too")
    if order.kind == "importance" and score.kind not in ("pooled", "sampled"):
        raise ValueError("order 'importance' sorts keys head by head, so it needs score 'pooled' or 'sampled'")
    if order.kind == "kmeans" and score.kind not in ("pooled",):
        raise ValueError("order 'kmeans' gives clusters of any size, so it needs score 'pooled'")
    if option and order.kind in ("importance", "kmeans"):
        raise ValueError(f"an option of heads lies by place, so its order cannot be {order.kind!r}")
    if option and score.kind == "mass" and score.cached:
        raise ValueError("an option of heads keeps nothing between decisions, so its score cannot be cached")
    if select.kind == "agents" and (option or order.kind != "raster" or keeps.own or keeps.by_place):
        raise ValueError("select 'agents' chooses no pairs, so it needs order 'raster', keeps all off, and no heads")
    if content and keeps.by_place:
        raise ValueError(f"order {order.kind!r} moves keys between units, so keeps has only 'own'")
    if order.kind == "tile" and order.packed and select.kind in LATTICE:
        raise ValueError(f"select {select.kind!r} counts tiles along the axes, so order 'tile' can't be packed")
    exact = select.kind in EXACT and getattr(select, "per", "token") == "token"
    if (select.kind == "neighborhood" or exact) and order.kind != "tile":
        raise ValueError(f"select {select.kind!r} needs order 'tile'")
    if exact and option:
        raise ValueError(f"select {select.kind!r} is exact to the token and cannot be an option of heads")
    if exact and (keeps.own or keeps.by_place):
        raise ValueError(f"select {select.kind!r} is exact to the token, so keeps must all be off")
    if select.kind == "radial" and not (order.kind == "axes" and order.axes == "fhw" and order.whole):
        raise ValueError("select 'radial' works frame by frame, so it needs order {kind: axes, whole: true}")
    if select.kind == "none" and not option:
        raise ValueError("select 'none' is an option of heads only")


def _check_key_run(score: Score, select: Select, option: bool) -> None:
    if option:
        raise ValueError("an option of heads shares its units with the others, so its order has no key_run")
    if select.geometric:
        raise ValueError(f"select {select.kind!r} goes by the places of whole units, so its order has no key_run")
    if not (isinstance(score, PooledScore) and score.softmax and score.weigh):
        raise ValueError(
            "order.key_run makes keys lie in units of other sizes, so it needs score {kind: pooled, weigh: true}"
        )
