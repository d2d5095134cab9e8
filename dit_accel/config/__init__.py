"""Validated, frozen configuration: what a recipe is made of, and how one is read from a name, file or dict."""

from .base import Config
from .check import build
from .correct import CentroidCorrect, Correct, DeltaCorrect, MassCorrect
from .files import read_file, write_file
from .heads import HeadChoice, Option
from .order import (
    AxesOrder,
    GilbertOrder,
    HilbertOrder,
    ImportanceOrder,
    KMeansOrder,
    Order,
    RasterOrder,
    StaticOrder,
    TileOrder,
)
from .recipe import AXES, Case, Recipe
from .score import (
    AntidiagonalScore,
    GeometryScore,
    MassScore,
    PooledScore,
    Score,
    SubtileScore,
)
from .select import (
    AllSelect,
    BandSelect,
    ColumnSelect,
    CumulativeSelect,
    DiskSelect,
    Keeps,
    NeighborhoodSelect,
    NoneSelect,
    PercentileSelect,
    RadialSelect,
    Select,
    TopKSelect,
    TopPSelect,
    WithinSelect,
)

__all__ = [
    "AXES",
    "AllSelect",
    "AntidiagonalScore",
    "AxesOrder",
    "BandSelect",
    "Case",
    "CentroidCorrect",
    "ColumnSelect",
    "Config",
    "Correct",
    "CumulativeSelect",
    "DeltaCorrect",
    "DiskSelect",
    "GeometryScore",
    "GilbertOrder",
    "HeadChoice",
    "HilbertOrder",
    "ImportanceOrder",
    "KMeansOrder",
    "Keeps",
    "MassCorrect",
    "MassScore",
    "NeighborhoodSelect",
    "NoneSelect",
    "Option",
    "Order",
    "PercentileSelect",
    "PooledScore",
    "RadialSelect",
    "RasterOrder",
    "Recipe",
    "Score",
    "Select",
    "StaticOrder",
    "SubtileScore",
    "TileOrder",
    "TopKSelect",
    "TopPSelect",
    "WithinSelect",
    "build",
    "read_file",
    "write_file",
]
