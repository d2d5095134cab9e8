"""The recipe table: each paper's method as a choice on the axes, with its own defaults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from ..config import (
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
    TileOrder,
    TopKSelect,
    TopPSelect,
    WithinSelect,
)

GRAT = "GRAT: Grouping First, Attending Smartly, Ren et al. 2025, arXiv 2505.14687"
DRAFT = "DraftAttention, Shen et al. 2025, arXiv 2505.14708"
GNA = "Generalized Neighborhood Attention, Hassani et al. 2025, arXiv 2504.16922"
CLEAR = "CLEAR, Liu et al. 2024, arXiv 2412.16112"
STA = "Sliding Tile Attention, Zhang et al. 2025, arXiv 2502.04507"
RADIAL = "Radial Attention, Li et al. 2025, arXiv 2506.19852"
SVG = "Sparse VideoGen, Xi et al. 2025, arXiv 2502.01776"
SVG2 = "Sparse VideoGen 2, Yang et al. 2025, arXiv 2505.18875"
EAR = "SVG-EAR, arXiv 2603.08982"
XATTENTION = "XAttention, Xu et al. 2025, arXiv 2503.16428"
SPARGE = "SpargeAttention, Zhang et al. 2025, arXiv 2502.18137"
PBS = "PBS-Attn, Wang et al. 2025, arXiv 2510.21270"
JENGA = "Jenga, Zhang et al. 2025, arXiv 2505.16864"
ADASPA = "AdaSpa, Xia et al. 2025, arXiv 2502.21079"
VMOBA = "VMoBA, Wu et al. 2025, arXiv 2506.23858"
DFS = "DFSAttn, ICML 2026"
VDIT = "Sparse-vDiT, Chen et al. 2025, arXiv 2506.03065"
RECTIFIED = "Rectified SpaAttn, Liu et al. 2025"
DELTA = "Delta Attention, Willette et al. 2025, arXiv 2505.11254"
MINFERENCE = "MInference, Jiang et al. 2024, arXiv 2407.02490"
ZIPVL = "ZipVL, He et al. 2024, arXiv 2410.08584"
CHANNELS = "Double Sparsity, Yang et al. 2024, arXiv 2408.07092"
PARO = "PAROAttention, Zhao et al. 2025, arXiv 2506.16054"
DUO = "DuoAttention, Xiao et al. 2024, arXiv 2410.10819"
MOA = "MoA, Fu et al. 2024, arXiv 2406.14909"
RETTENTION = "Re-ttention, Chen et al. 2025"
TIDAL = "TidalDecode, Yang et al. 2024, arXiv 2410.05076"

GRAT_TILES = TileOrder(picture=(1, 16, 16), video=(4, 8, 8))
DRAFT_TILES = TileOrder(picture=(1, 8, 16), video=(1, 8, 16))
STA_TILES = TileOrder(picture=(1, 16, 16), video=(6, 8, 8))
CUBES = TileOrder(picture=(1, 8, 8), video=(4, 4, 4))
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
    Recipe(name="grat-b", order=GRAT_TILES, score=GeometryScore(), select=WithinSelect(radius=1), sources=(GRAT,)),
    Recipe(
        name="grat-x",
        order=GRAT_TILES,
        score=GeometryScore(shape="cross"),
        select=WithinSelect(radius=0),
        sources=(GRAT,),
    ),
    Recipe(name="gna", order=CUBES, select=NeighborhoodSelect(density=0.1), keeps=NOTHING, sources=(GNA,)),
    Recipe(name="clear", order=CUBES, select=DiskSelect(radius=16), keeps=NOTHING, sources=(CLEAR,)),
    Recipe(
        name="sta",
        order=STA_TILES,
        select=NeighborhoodSelect(kernel=(3, 3, 3), stride=(1, 1, 1), per="tile"),
        search=HeadChoice(options=tuple(_windows(0.1, 0.2, 0.4)), budget=0.2),
        sources=(STA,),
    ),
    Recipe(name="radial", order=AxesOrder(whole=True), select=RadialSelect(decay=0.95), sources=(RADIAL,)),
)

BY_CONTENT = _by_name(
    Recipe(
        name="draft", order=DRAFT_TILES, score=PooledScore(), select=PercentileSelect(density=0.25), sources=(DRAFT,)
    ),
    Recipe(
        name="xattention",
        order=RasterOrder(),
        score=AntidiagonalScore(stride=16),
        select=TopPSelect(p=0.9),
        block_k=128,
        sources=(XATTENTION,),
    ),
    Recipe(
        name="sparge",
        order=HilbertOrder(),
        score=PooledScore(smooth=True, trust=-0.1),
        select=TopKSelect(density=0.5),
        sources=(SPARGE,),
    ),
    Recipe(
        name="pbs",
        order=ImportanceOrder(),
        score=PooledScore(),
        select=TopPSelect(p=0.9),
        keeps=NOTHING,
        sources=(PBS,),
    ),
    Recipe(
        name="jenga",
        order=GilbertOrder(),
        score=PooledScore(),
        select=TopPSelect(p=0.3, least=0.25),
        keeps=Keeps(adjacent=True),
        block_k=128,
        sources=(JENGA,),
    ),
    Recipe(
        name="dfs",
        order=HilbertOrder(),
        score=SubtileScore(tokens=16),
        select=TopKSelect(density=0.3),
        every=12,
        dense_layers=1,
        block_k=128,
        sources=(DFS,),
    ),
    Recipe(
        name="adaspa",
        order=RasterOrder(),
        score=MassScore(),
        select=TopKSelect(density=0.2, spread=True),
        decide_at=(0.2, 0.6),
        block_q=64,
        sources=(ADASPA,),
    ),
    Recipe(
        name="minference",
        order=TileOrder(picture=(1, 8, 8), video=(4, 4, 4)),
        score=SampledScore(),
        select=LinesSelect(columns=0.2, density=0.1),
        sources=(MINFERENCE,),
    ),
    Recipe(
        name="zipvl",
        order=ImportanceOrder(),
        score=SampledScore(),
        select=TopPSelect(p=0.975),
        keeps=NOTHING,
        sources=(ZIPVL,),
    ),
    Recipe(
        name="double-sparsity",
        order=GilbertOrder(),
        score=ChannelScore(share=0.25),
        select=TopKSelect(density=0.3),
        every=5,
        sources=(CHANNELS,),
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
        sources=(VMOBA,),
    ),
)

BY_HEAD = _by_name(
    Recipe(name="svg1", heads=HeadChoice(options=(_band("fhw"), _band("hwf"))), keeps=NOTHING, sources=(SVG,)),
    Recipe(
        name="sparse-vdit",
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
        sources=(VDIT,),
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
        sources=(PARO,),
    ),
    Recipe(
        name="duo",
        heads=HeadChoice(options=(_band(density=0.1), Option(select=AllSelect())), budget=0.5),
        keeps=Keeps(sinks=16),
        every=1000,
        sources=(DUO,),
    ),
    Recipe(
        name="moa",
        heads=HeadChoice(options=tuple(_band(density=d) for d in (0.1, 0.2, 0.35, 0.5, 0.75)), budget=0.5),
        keeps=Keeps(sinks=64),
        every=1000,
        sources=(MOA,),
    ),
)

BY_CLUSTER = _by_name(
    Recipe(
        name="svg2",
        order=KMeansOrder(),
        score=PooledScore(weigh=True),
        select=TopPSelect(p=0.9, least=0.1),
        block_q=64,
        sources=(SVG2,),
    ),
    Recipe(
        name="svg-ear",
        order=KMeansOrder(),
        score=PooledScore(weigh=True),
        select=ErrorSelect(p=0.9, least=0.1),
        correct=CentroidCorrect(),
        block_q=64,
        sources=(EAR,),
    ),
)

CORRECTED = _by_name(
    Recipe(
        name="rectified",
        order=GilbertOrder(),
        score=PooledScore(weigh=True),
        select=TopPSelect(p=0.3, least=0.2),
        keeps=Keeps(adjacent=True),
        correct=MassCorrect(),
        block_k=128,
        sources=(RECTIFIED,),
    ),
    Recipe(
        name="delta",
        order=AxesOrder(),
        select=BandSelect(density=0.2),
        correct=DeltaCorrect(stride=64),
        sources=(DELTA,),
    ),
    Recipe(
        name="rettention",
        order=AxesOrder(),
        select=BandSelect(density=0.1),
        correct=ResidualCorrect(every=5, growth=0.04),
        sources=(RETTENTION,),
    ),
    Recipe(
        name="tidal",
        order=GilbertOrder(),
        score=MassScore(),
        select=TopKSelect(density=0.3),
        dense_layers=2,
        decide_layers=(2, 13),
        sources=(TIDAL,),
    ),
)

RECIPES: dict[str, Recipe] = {**BY_PLACE, **BY_CONTENT, **BY_HEAD, **BY_CLUSTER, **CORRECTED}

_PRESET = {"order": DRAFT_TILES, "score": PooledScore(), "adaptive": True, "sources": (DRAFT,)}
PRESETS = _by_name(
    Recipe(name="quality", select=TopKSelect(density=0.5), dense_steps=0.25, **_PRESET),
    Recipe(name="balanced", select=TopKSelect(density=0.3), dense_steps=0.2, **_PRESET),
    Recipe(name="fast", select=TopKSelect(density=0.2), dense_steps=0.15, every=2, **_PRESET),
)
