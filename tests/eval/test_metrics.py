"""The figures against formulas written out by hand, on pictures made for it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from dit_accel.errors import ConfigError
from dit_accel.eval import metrics, vmaf
from dit_accel.eval.metrics import compare
from dit_accel.pipelines.media import Media


def picture(seed: int, size: tuple[int, int] = (75, 61)) -> np.ndarray:
    """Make a smooth picture with noise, uint8 [height, width, 3], no value near the ends."""
    make = np.random.default_rng(seed)
    y, x = np.mgrid[: size[1], : size[0]]
    waves = np.stack([np.sin(x / (4 + c)) + np.cos(y / (5 + c)) for c in range(3)], -1)
    return np.clip(128 + 30 * waves + make.normal(0, 5, waves.shape), 30, 225).astype(np.uint8)


def media(*frames: np.ndarray, fps: float | None = None) -> Media:
    return Media(tuple(Image.fromarray(frame) for frame in frames), fps)


def test_psnr_of_a_known_error() -> None:
    a = picture(0)
    assert compare(media(a + 10), media(a)).psnr == pytest.approx(20 * math.log10(255 / 10), abs=1e-3)
    half = a.copy()
    half[:, : a.shape[1] // 5 * 2] += 10
    error = 100 * (a.shape[1] // 5 * 2) / a.shape[1]
    assert compare(media(half), media(a)).psnr == pytest.approx(10 * math.log10(255**2 / error), abs=1e-3)


def test_equal_pictures_have_no_psnr_and_perfect_scores() -> None:
    found = compare(media(picture(1)), media(picture(1)))
    assert found.psnr is None
    assert found.ssim == pytest.approx(1)
    assert found.ms_ssim == pytest.approx(1)
    assert found.flip == pytest.approx(0, abs=1e-6)
    assert (found.temporal_error, found.vmaf, found.frame_psnr) == (None, None, ())


def ssim_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, window by window with loops over positions, mirrored at the border."""
    taps = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2
    x, y = (np.pad(p / 255, ((5, 5), (5, 5), (0, 0)), mode="reflect") for p in (a, b))
    scores = []
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            w = window[..., None]
            mp, mq = (w * p).sum((0, 1)), (w * q).sum((0, 1))
            vp, vq = (w * p * p).sum((0, 1)) - mp**2, (w * q * q).sum((0, 1)) - mq**2
            cov = (w * p * q).sum((0, 1)) - mp * mq
            top = (2 * mp * mq + 0.01**2) * (2 * cov + 0.03**2)
            scores.append(top / ((mp**2 + mq**2 + 0.01**2) * (vp + vq + 0.03**2)))
    return float(np.mean(scores))


def test_a_clips_figures_are_means_over_its_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """MS-SSIM of every frame, whatever is held at a time; FLIP of every fourth."""
    clean = [picture(10 + i) for i in range(11)]
    make = np.random.default_rng(4)
    made = [np.clip(a + (2 + i) * make.normal(0, 1, a.shape), 0, 255).astype(np.uint8) for i, a in enumerate(clean)]
    alone = [compare(media(b), media(a)) for a, b in zip(clean, made, strict=True)]
    monkeypatch.setattr(metrics, "has_vmaf", lambda: False)
    clip = compare(media(*made, fps=8.0), media(*clean, fps=8.0))
    assert clip.ms_ssim == pytest.approx(np.mean([one.ms_ssim for one in alone]), abs=1e-6)
    assert clip.ssim == pytest.approx(np.mean([one.ssim for one in alone]), abs=1e-6)
    assert clip.flip == pytest.approx(np.mean([one.flip for one in alone[::4]]), abs=1e-6)


def test_ssim_is_the_papers() -> None:
    make = np.random.default_rng(2)
    a = picture(2, (37, 31))
    b = np.clip(a + make.normal(0, 12, a.shape), 0, 255).astype(np.uint8)
    assert compare(media(b), media(a)).ssim == pytest.approx(ssim_by_hand(b, a), abs=2e-4)


def test_every_figure_falls_with_the_error() -> None:
    make = np.random.default_rng(3)
    a, noise = picture(3), make.normal(0, 1, picture(3).shape)
    found = [compare(media(np.clip(a + s * noise, 0, 255).astype(np.uint8)), media(a)) for s in (2, 8, 24)]
    for name, sign in (("psnr", -1), ("ssim", -1), ("ms_ssim", -1), ("flip", 1)):
        values = [sign * getattr(f, name) for f in found]
        assert values == sorted(values), name
        assert values[0] < values[2]


def test_a_clip_is_the_mean_of_its_frames_and_flicker_is_seen() -> None:
    frames = [picture(4) for _ in range(4)]
    flicker = [frame + 10 * (i % 2) for i, frame in enumerate(frames)]
    still = [frame + 10 for frame in frames]
    one, other = (compare(media(*f, fps=8), media(*frames, fps=8)) for f in (flicker, still))
    assert one.frame_psnr == (None, pytest.approx(28.131, abs=1e-2), None, pytest.approx(28.131, abs=1e-2))
    assert one.psnr == pytest.approx(28.131, abs=1e-2)
    assert one.temporal_error == pytest.approx(10)
    assert other.temporal_error == pytest.approx(0)


def test_vmaf_tells_a_good_clip_from_a_bad_one() -> None:
    make = np.random.default_rng(5)
    frames = [picture(5, (192, 160)) for _ in range(3)]
    bad = [np.clip(f + make.normal(0, 40, f.shape), 0, 255).astype(np.uint8) for f in frames]
    if not vmaf.has_vmaf():
        assert "VMAF is left out" in " ".join(metrics.missing(clip=True))
        return
    same = vmaf.vmaf(media(*frames, fps=8), media(*frames, fps=8))
    worse = vmaf.vmaf(media(*bad, fps=8), media(*frames, fps=8))
    assert same is not None
    assert worse is not None
    assert worse < 80 < 90 < same


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 frames of 75x61 cannot be compared with 2 frames of 75x61"):
        compare(media(picture(6)), media(picture(6), picture(6), fps=8))


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "has_flip", lambda: False)
    assert compare(media(picture(7)), media(picture(8))).flip is None
    assert "FLIP is left out" in metrics.missing(clip=False)[0]
