"""What may be asked of a model besides the prompt, and what its folder says where nothing is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from dit_accel.config import Config, build, read_file

FILE = "dit_accel.json"
MOST_FPS = 120

Count = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(strict=False)]


class Defaults(Config, frozen=True):
    """What a model is best asked for; None leaves the pipeline's own default.

    `height` and `width` in pixels, `frames` and `fps` (frames a second) of clips, `guidance` the pipeline's
    `guidance_scale`, `true_cfg` its `true_cfg_scale` where it has both, `text_length` its `max_sequence_length`.
    """

    steps: Count | None = None
    height: Count | None = None
    width: Count | None = None
    frames: Count | None = None
    fps: Annotated[float, Field(strict=False, ge=1, le=MOST_FPS)] | None = None
    negative_prompt: str | None = None
    guidance: Number | None = None
    true_cfg: Number | None = None
    text_length: Count | None = None


class Settings(Defaults, frozen=True):
    """What is asked of a pipeline besides the prompt."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def over(self, defaults: Defaults) -> Settings:
        """Return these settings, what is not asked taken from `defaults`."""
        return self.model_copy(update={**defaults.model_dump(), **self.model_dump(exclude_none=True)})


def model_defaults(source: str | Path) -> Defaults:
    """Read what a model folder's optional `dit_accel.json` asks for; nothing for a folder without one, or a Hub id.

    Raises ConfigError where the file is broken or holds what no model could take.
    """
    file = Path(source) / FILE
    return build(Defaults, read_file(file), str(file)) if file.is_file() else Defaults()
