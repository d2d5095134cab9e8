"""What all settings share: frozen models, and the number types that axes use."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag


class Config(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """Base of all settings: frozen, hashable, strict about types, unknown keys refused."""

    @property
    def brief(self) -> str:
        """The choice in few words: its kind, its main numbers, and what differs from the default."""
        words = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name == "kind" or (name in MAIN and value is not None):
                words.append(_short(value))
            elif value != field.default:
                words.append(name if value is True else f"{name}={_short(value)}")
        return " ".join(words)


MAIN = (
    "axes",
    "picture",
    "video",
    "shape",
    "radius",
    "p",
    "density",
)  # numbers shown bare, also where they are the default


def _short(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


Density = Annotated[float, Field(gt=0, le=1, strict=False)]
Share = Annotated[float, Field(ge=0, le=1, strict=False)]


def _form(value: Any) -> str:
    return "heads" if isinstance(value, list | tuple) else "all"


# one number for all heads, or one for each; told apart by form, so that an error speaks of one of them only
ShareOfHead = Annotated[
    Annotated[Share, Tag("all")] | Annotated[tuple[Share, ...], Field(min_length=1, strict=False), Tag("heads")],
    Discriminator(_form),
]
Side = Annotated[int, Field(ge=1, le=4096)]
Tile = Annotated[tuple[Side, Side, Side], Field(strict=False)]
Block = Literal[16, 32, 64, 128]
Count = Annotated[int, Field(ge=1)]
