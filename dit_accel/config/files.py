"""Settings in files: YAML or JSON, read with care and written back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from .recipe import Recipe


def read_file(path: Path, mib: int = 1) -> dict[str, Any]:
    """Read a YAML or JSON mapping; ConfigError when it is missing, broken, no mapping, or larger than so many MiB."""
    try:
        if path.stat().st_size > mib << 20:
            raise ConfigError(f"{path}: larger than {mib} MiB, too much for settings.")
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    except (yaml.YAMLError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: is no valid {path.suffix[1:].upper()} ({str(error).splitlines()[0]}).") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(data).__name__}.")
    return data


def write_file(recipe: Recipe, path: Path) -> None:
    """Write a recipe as YAML, or as JSON where the name ends so."""
    data = json.loads(recipe.model_dump_json())
    text = json.dumps(data, indent=2) if path.suffix == ".json" else yaml.safe_dump(data, sort_keys=False)
    path.write_text(text, encoding="utf-8")
