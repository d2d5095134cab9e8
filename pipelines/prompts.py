"""Which prompts a command runs when it takes several: those named, those in a file, or the demo's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dit_accel.errors import ConfigError


def listed_prompts(prompts: Sequence[str] | None, file: Path | None) -> list[str]:
    """Return the prompts asked for, each once; ConfigError for a file that cannot be read or holds none."""
    listed = list(prompts or [])
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"prompts {file}: cannot be read ({reason}).") from None
        listed += [line.strip() for line in text.splitlines() if line.strip()]
        if not listed:
            raise ConfigError(f"prompts {file}: holds no prompt.")
    return list(dict.fromkeys(listed))


def demo_prompts(clips: bool) -> list[str]:
    """Return the demo's own prompts, for clips or for pictures."""
    from .demo import CLIP_PROMPTS, PROMPTS

    return list(CLIP_PROMPTS if clips else PROMPTS)
