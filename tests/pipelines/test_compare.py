"""Figures that compare pictures, against values known from elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from dit_accel.pipelines.compare import GAIN, Cell, Likeness, difference, psnr, sheet, ssim
from dit_accel.pipelines.media import Media


def noise(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def flat(value: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (value, value, value))


def test_equal_pictures() -> None:
    a = noise(0)
    assert psnr(a, a) == math.inf
    assert ssim(a, a) == pytest.approx(1, abs=1e-12)
    alike = Likeness.of(Media.picture(a), Media.picture(a))
    assert alike.to_dict() == {"psnr": None, "ssim": pytest.approx(1)}
    assert str(alike) == "equal pictures"


def test_psnr_of_a_known_error() -> None:
    assert psnr(flat(100), flat(110)) == pytest.approx(20 * math.log10(255 / 10))


def test_ssim_of_flat_pictures_is_the_luminance_term() -> None:
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(flat(100), flat(150)) == pytest.approx(expected, abs=1e-9)


def test_unrelated_noise_is_unlike() -> None:
    assert abs(ssim(noise(0), noise(1))) < 0.05
    assert str(Likeness.of(Media.picture(noise(0)), Media.picture(noise(1)))).startswith("PSNR 7.")


def test_ssim_of_noisy_ramps_is_what_scikit_image_says() -> None:
    # structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
    base = np.full((48, 64, 3), 128.0) + np.linspace(-60, 60, 64)[None, :, None]
    step = np.random.default_rng(0).normal(size=base.shape)
    clean, *noisy = (Image.fromarray((base + k * step).clip(0, 255).astype(np.uint8)) for k in (0, 2, 8, 32))
    expected = [0.9494799297526688, 0.5524609036947523, 0.07371342249361723]
    assert [ssim(clean, picture) for picture in noisy] == pytest.approx(expected, abs=1e-6)


def test_pictures_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        psnr(flat(0), noise(0))


def test_difference_is_amplified_and_clipped() -> None:
    for a, b, shown in ((100, 110, 10 * GAIN), (0, 255, 255)):
        pixels = difference(Media.picture(flat(a)), Media.picture(flat(b)))
        assert pixels.image.getpixel((0, 0)) == (shown,) * 3


def test_sheet_shows_every_picture_and_label() -> None:
    cells = [Cell(Media.picture(flat(value)), ["a label that is wider than the picture is"]) for value in (10, 80, 160)]
    bare = [Cell(cell.media, [""]) for cell in cells]
    page = np.asarray(sheet([cells, cells]).image)
    for value in (10, 80, 160):
        assert (page == value).all(axis=2).sum() >= 2 * 256 * 256  # twice, enlarged to 256 pixels
    assert (page == 0).all(axis=2).sum() > (np.asarray(sheet([bare, bare]).image) == 0).all(axis=2).sum()


# -- clips ---
def clip(*values: int) -> Media:
    return Media(tuple(flat(value) for value in values), 8)


def test_what_stands_still_is_no_temporal_error() -> None:
    alike = Likeness.of(clip(10, 60, 90), clip(20, 70, 100))
    assert alike.temporal_error == 0
    assert alike.psnr == alike.psnr_min == pytest.approx(20 * math.log10(255 / 10))


def test_temporal_error_of_flicker_and_of_noise() -> None:
    assert Likeness.of(clip(100, 100, 100), clip(110, 90, 110)).temporal_error == pytest.approx(20)
    assert Likeness.of(clip(100, 100, 100), clip(100, 100, 130)).temporal_error == pytest.approx(math.sqrt(450))
    a, b = (Media(tuple(noise(seed + i) for i in range(4)), 8) for seed in (0, 50))
    x, y = (np.stack([np.asarray(frame, float) for frame in media.frames]) for media in (a, b))
    expected = np.sqrt(((np.diff(x, axis=0) - np.diff(y, axis=0)) ** 2).mean())
    assert Likeness.of(a, b).temporal_error == pytest.approx(expected)


def test_figures_of_single_frames_and_the_worst() -> None:
    alike = Likeness.of(clip(50, 60, 70), clip(50, 61, 80))
    ten, one = 20 * math.log10(255 / 10), 20 * math.log10(255)
    assert alike.frame_psnr == (None, pytest.approx(one), pytest.approx(ten))
    assert alike.psnr == pytest.approx((one + ten) / 2), "over the frames that differ"
    assert alike.psnr_min == pytest.approx(ten)
    assert alike.frame_ssim[0] == pytest.approx(1)
    assert alike.ssim_min == min(alike.frame_ssim) < alike.ssim == pytest.approx(np.mean(alike.frame_ssim))
    assert set(alike.to_dict()) == {
        "psnr",
        "ssim",
        "psnr_min",
        "ssim_min",
        "temporal_error",
        "frame_psnr",
        "frame_ssim",
    }
    assert "temporal error" in str(alike)


def test_equal_clips() -> None:
    alike = Likeness.of(clip(1, 2), clip(1, 2))
    assert (alike.psnr, alike.psnr_min, alike.temporal_error, str(alike)) == (None, None, 0, "equal frames")


def test_clips_of_two_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 3 frames cannot be compared"):
        Likeness.of(clip(1, 2), clip(1, 2, 3))


def test_difference_of_clips_is_frame_by_frame() -> None:
    shown = difference(clip(100, 50), clip(110, 45))
    assert [frame.getpixel((0, 0)) for frame in shown.frames] == [(40,) * 3, (20,) * 3]
    assert shown.fps == 8


def test_sheet_of_clips_plays_all_and_holds_the_shorter() -> None:
    page = sheet([[Cell(clip(10, 20, 30), ["a"]), Cell(clip(110, 120), ["b"]), Cell(Media.picture(flat(200)), ["c"])]])
    assert (len(page.frames), page.fps) == (3, 8)
    for frame, values in zip(page.frames, ((10, 110, 200), (20, 120, 200), (30, 120, 200)), strict=True):
        for value in values:
            assert (np.asarray(frame) == value).all(axis=2).sum() >= 256 * 256
