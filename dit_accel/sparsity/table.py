"""The recipe table: each paper's method as a choice on the axes, with its own defaults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from ..config import (
    AgentSelect,
    AllSelect,
    Along,
    AntidiagonalScore,
    Axes,
    AxesOrder,
    BandSelect,
    Case,
    CentroidCorrect,
    ChannelScore,
    ColumnSelect,
    CumulativeSelect,
    DeltaCorrect,
    DiskSelect,
    ErrorSelect,
    GeometryScore,
    GilbertOrder,
    HeadChoice,
    HilbertOrder,
    ImportanceOrder,
    Keeps,
    KMeansOrder,
    LinesSelect,
    LowBitScore,
    MassCorrect,
    MassScore,
    NeighborhoodSelect,
    NoneSelect,
    Option,
    PercentileSelect,
    PooledScore,
    RadialSelect,
    RasterOrder,
    Recipe,
    ResidualCorrect,
    SampledScore,
    SubtileScore,
    ThresholdSelect,
    TileOrder,
    TopKSelect,
    TopPSelect,
    TreeScore,
    WithinSelect,
)
from . import papers
from .mixtures import auto

GRAT_TILES = TileOrder(picture=(1, 16, 16), video=(4, 8, 8))
DRAFT_TILES = TileOrder(picture=(1, 8, 16), video=(1, 8, 16), packed=True)
STA_TILES = TileOrder(picture=(1, 16, 16), video=(6, 8, 8))
CUBES = TileOrder(picture=(1, 8, 8), video=(4, 4, 4))
BLOCKS_OF_128 = TileOrder(picture=(1, 8, 16), video=(2, 8, 8))
NOTHING = Keeps(own=False)


def _by_name(*recipes: Recipe) -> dict[str, Recipe]:
    return {recipe.name: recipe for recipe in recipes}


def _band(axes: Axes = "fhw", density: float = 0.3) -> Option:
    return Option(order=AxesOrder(axes=axes), select=BandSelect(density=density))


def _windows(*densities: float) -> Iterator[Option]:
    """Yield windows of tiles that span some axes whole, or none."""
    for density in densities:
        for along in get_args(Along):
            select = NeighborhoodSelect(stride=(1, 1, 1), along=along, per="tile", density=density)
            yield Option(order=STA_TILES, select=select)
    yield Option(order=STA_TILES, select=AllSelect())


BY_PLACE = _by_name(
    Recipe(
        name="grat-b", order=GRAT_TILES, score=GeometryScore(), select=WithinSelect(radius=1), sources=(papers.GRAT,)
    ),
    Recipe(
        name="grat-x",
        order=GRAT_TILES,
        score=GeometryScore(shape="cross"),
        select=WithinSelect(radius=0),
        sources=(papers.GRAT,),
    ),
    Recipe(name="gna", order=CUBES, select=NeighborhoodSelect(density=0.1), keeps=NOTHING, sources=(papers.GNA,)),
    Recipe(name="clear", order=CUBES, select=DiskSelect(radius=16), keeps=NOTHING, sources=(papers.CLEAR,)),
    Recipe(
        name="sta",
        order=STA_TILES,
        select=NeighborhoodSelect(kernel=(3, 3, 3), stride=(1, 1, 1), per="tile"),
        search=HeadChoice(options=tuple(_windows(0.1, 0.2, 0.4)), budget=0.2),
        sources=(papers.STA,),
    ),
    Recipe(name="radial", order=AxesOrder(whole=True), select=RadialSelect(decay=0.95), sources=(papers.RADIAL,)),
)

BY_CONTENT = _by_name(
    Recipe(
        name="draft",
        order=DRAFT_TILES,
        score=PooledScore(),
        select=PercentileSelect(density=0.25),
        sources=(papers.DRAFT,),
    ),
    Recipe(
        name="xattention",
        text="ranked",
        order=RasterOrder(),
        score=AntidiagonalScore(stride=16),
        select=TopPSelect(p=0.9),
        block_k=128,
        sources=(papers.XATTENTION,),
    ),
    Recipe(
        name="sparge",
        text="ranked",
        order=HilbertOrder(),
        score=PooledScore(smooth=True, trust=-0.1),
        select=TopKSelect(density=0.5),
        sources=(papers.SPARGE,),
    ),
    Recipe(
        name="pbs",
        text="ranked",
        order=ImportanceOrder(),
        score=PooledScore(),
        select=TopPSelect(p=0.9),
        keeps=NOTHING,
        sources=(papers.PBS,),
    ),
    Recipe(
        name="jenga",
        order=GilbertOrder(),
        score=PooledScore(),
        select=TopPSelect(p=0.3, least=0.25),
        keeps=Keeps(adjacent=True),
        block_k=128,
        sources=(papers.JENGA,),
    ),
    Recipe(
        name="dfs",
        order=HilbertOrder(),
        score=SubtileScore(tokens=16),
        select=TopKSelect(density=0.3),
        every=12,
        dense_layers=1,
        block_k=128,
        sources=(papers.DFS,),
    ),
    Recipe(
        name="adaspa",
        order=RasterOrder(),
        score=MassScore(cached=True),
        select=TopKSelect(density=0.2, spread=True),
        decide_at=(0.2, 0.6),
        block_q=64,
        sources=(papers.ADASPA,),
    ),
    Recipe(
        name="minference",
        text="ranked",
        order=TileOrder(picture=(1, 8, 8), video=(4, 4, 4)),
        score=SampledScore(),
        select=LinesSelect(columns=0.2, density=0.1),
        sources=(papers.MINFERENCE,),
    ),
    Recipe(
        name="zipvl",
        text="ranked",
        order=ImportanceOrder(),
        score=SampledScore(),
        select=TopPSelect(p=0.975),
        keeps=NOTHING,
        sources=(papers.ZIPVL,),
    ),
    Recipe(
        name="double-sparsity",
        text="ranked",
        order=GilbertOrder(),
        score=ChannelScore(share=0.25),
        select=TopKSelect(density=0.3),
        every=5,
        sources=(papers.CHANNELS,),
    ),
    Recipe(
        name="hip",
        text="ranked",
        order=HilbertOrder(),
        score=TreeScore(queries=4),
        select=TopKSelect(density=0.1),
        every=8,
        dense_layers=4,
        block_q=64,
        sources=(papers.HIP,),
    ),
    Recipe(
        name="sale",
        text="ranked",
        order=HilbertOrder(),
        score=LowBitScore(bits=4),
        select=ThresholdSelect(above=0.008),
        every=5,
        block_q=64,
        sources=(papers.SALE,),
    ),
    Recipe(
        name="vmoba",
        order=TileOrder(picture=(1, 8, 8), video=(4, 8, 8)),
        score=PooledScore(softmax=False),
        select=CumulativeSelect(p=0.25, rescale=True),
        cases=(
            Case(layers="0::3", order=AxesOrder(whole=True)),
            Case(layers="1::3", order=TileOrder(picture=(1, 8, 8), video=(1, 16, 16))),
        ),
        sources=(papers.VMOBA,),
    ),
)

BY_HEAD = _by_name(
    Recipe(name="svg1", heads=HeadChoice(options=(_band("fhw"), _band("hwf"))), keeps=NOTHING, sources=(papers.SVG,)),
    Recipe(
        name="sparse-vdit",
        text="skipped",
        heads=HeadChoice(
            options=(
                Option(select=AllSelect()),
                Option(select=NoneSelect()),
                _band("fhw"),
                _band("hwf"),
                Option(select=ColumnSelect(density=0.3)),
            ),
            price=0.5,
            limit=1.0,
        ),
        keeps=NOTHING,
        every=1000,
        sources=(papers.VDIT,),
    ),
    Recipe(
        name="paro",
        heads=HeadChoice(
            options=tuple(
                Option(order=AxesOrder(axes=axes), score=MassScore(), select=PercentileSelect(density=0.3))
                for axes in get_args(Axes)
            ),
            loss="mass",
        ),
        keeps=NOTHING,
        decide_at=(0.2, 0.5),
        block_q=64,
        sources=(papers.PARO,),
    ),
    Recipe(
        name="flexprefill",
        text="ranked",
        heads=HeadChoice(
            options=(
                Option(order=BLOCKS_OF_128, score=PooledScore(weigh=True), select=CumulativeSelect(p=0.9)),
                Option(order=BLOCKS_OF_128, score=SampledScore(rows=128), select=LinesSelect(p=0.9)),
            ),
            rows=256,
            trust=0.1,
        ),
        block_k=128,
        sources=(papers.FLEXPREFILL,),
    ),
    Recipe(
        name="duo",
        text="ranked",
        heads=HeadChoice(options=(_band(density=0.1), Option(select=AllSelect())), budget=0.5),
        keeps=Keeps(sinks=16),
        every=1000,
        sources=(papers.DUO,),
    ),
    Recipe(
        name="moa",
        text="ranked",
        heads=HeadChoice(options=tuple(_band(density=d) for d in (0.1, 0.2, 0.35, 0.5, 0.75)), budget=0.5),
        keeps=Keeps(sinks=64),
        every=1000,
        sources=(papers.MOA,),
    ),
)

BY_CLUSTER = _by_name(
    Recipe(
        name="svg2",
        order=KMeansOrder(),
        score=PooledScore(weigh=True),
        select=TopPSelect(p=0.9, least=0.1),
        sources=(papers.SVG2,),
    ),
    Recipe(
        name="svg-ear",
        order=KMeansOrder(),
        score=PooledScore(weigh=True),
        select=ErrorSelect(p=0.9, least=0.1),
        correct=CentroidCorrect(),
        sources=(papers.EAR,),
    ),
    Recipe(
        name="svoo",
        order=KMeansOrder(queries=256, keys=1024, first=2, later=2, joint=True),
        score=PooledScore(weigh=True),
        select=TopPSelect(p=0.9, least=0.1),
        every=20,
        dense_layers=1,
        sources=(papers.SVOO,),
    ),
)

CORRECTED = _by_name(
    Recipe(
        name="hilbert-ear",
        order=HilbertOrder(key_run=64),
        score=PooledScore(weigh=True),
        select=ErrorSelect(p=0.9, least=0.1),
        correct=CentroidCorrect(),
        sources=(papers.EAR, papers.SPARGE),
    ),
    Recipe(
        name="rectified",
        order=GilbertOrder(),
        score=PooledScore(weigh=True),
        select=TopPSelect(p=0.3, least=0.2),
        keeps=Keeps(adjacent=True),
        correct=MassCorrect(),
        block_k=128,
        sources=(papers.RECTIFIED,),
    ),
    Recipe(
        name="delta",
        text="ranked",
        order=AxesOrder(),
        select=BandSelect(density=0.2),
        correct=DeltaCorrect(stride=64),
        sources=(papers.DELTA,),
    ),
    Recipe(
        name="rettention",
        order=AxesOrder(),
        select=BandSelect(density=0.1),
        correct=ResidualCorrect(every=5, growth=0.04),
        sources=(papers.RETTENTION,),
    ),
    Recipe(
        name="tidal",
        text="ranked",
        order=GilbertOrder(),
        score=MassScore(),
        select=TopKSelect(density=0.3),
        dense_layers=2,
        decide_layers=(2, 13),
        sources=(papers.TIDAL,),
    ),
)

OPERATORS = _by_name(
    Recipe(
        name="agent", order=RasterOrder(), select=AgentSelect(density=0.125), keeps=NOTHING, sources=(papers.AGENT,)
    ),
)

RECIPES: dict[str, Recipe] = {
    **BY_PLACE,
    **BY_CONTENT,
    **BY_HEAD,
    **BY_CLUSTER,
    **CORRECTED,
    **OPERATORS,
    auto().name: auto().at(),
}

_PRESET = {
    "order": HilbertOrder(key_run=64),
    "score": PooledScore(weigh=True),
    "correct": CentroidCorrect(),
    "every": 4,
    "adaptive": True,
    "sources": (papers.EAR, papers.SPARGE),
}
PRESETS = _by_name(
    Recipe(name="quality", select=ErrorSelect(density=0.3), dense_steps=0.25, **_PRESET),
    Recipe(name="balanced", select=ErrorSelect(density=0.2), dense_steps=0.2, **_PRESET),
    Recipe(name="fast", select=ErrorSelect(density=0.1), dense_steps=0.15, **_PRESET),
)
