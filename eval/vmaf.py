"""VMAF of a clip against another, by the libvmaf inside imageio-ffmpeg's ffmpeg."""

from __future__ import annotations

import json
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from dit_accel.errors import ConfigError
from dit_accel.pipelines.ffmpeg import executable
from dit_accel.pipelines.media import Media

SECONDS = 600


@lru_cache(maxsize=1)
def has_vmaf() -> bool:
    """Say whether there is an ffmpeg here, and libvmaf in it."""
    try:
        done = subprocess.run([executable(), "-hide_banner", "-filters"], capture_output=True, text=True, timeout=60)
    except (ConfigError, OSError, subprocess.TimeoutExpired):
        return False
    return " libvmaf " in done.stdout


def vmaf(made: Media, reference: Media) -> float | None:
    """Return the mean VMAF (v0.6.1) of a clip against the reference, 0 to 100; None where ffmpeg cannot tell.

    Frames are handed over as they are and turned to 4:2:0 by ffmpeg, which is what the model was trained on.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs: list[str] = []
        for name, media in (("made.rgb", made), ("reference.rgb", reference)):
            frames = np.stack([np.asarray(frame.convert("RGB")) for frame in media.frames])
            (Path(folder) / name).write_bytes(frames.tobytes())
            size = f"{media.image.width}x{media.image.height}"
            inputs += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", f"{media.fps or 16:g}", "-i", name]
        graph = (
            "[0:v]format=yuv420p[a];[1:v]format=yuv420p[b];"
            "[a][b]libvmaf=model=version=vmaf_v0.6.1:log_fmt=json:log_path=vmaf.json"
        )
        command = [executable(), "-v", "error", "-nostdin", *inputs, "-lavfi", graph, "-f", "null", "-"]
        try:
            subprocess.run(command, cwd=folder, capture_output=True, timeout=SECONDS, check=True)
            log = json.loads((Path(folder) / "vmaf.json").read_text())
            return float(log["pooled_metrics"]["vmaf"]["mean"])
        except (OSError, ValueError, KeyError, subprocess.SubprocessError):
            return None
