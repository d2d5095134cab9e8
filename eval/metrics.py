"""How far a picture or clip is from the reference: PSNR, SSIM, MS-SSIM, FLIP, and of clips temporal error and VMAF.

PSNR, SSIM and MS-SSIM are torchmetrics' with its defaults on values in 0..1, means over the frames. Its SSIM counts the
mirrored border, which `pipelines/compare.py` leaves out. MS-SSIM takes five scales where the shorter side has more than
160 pixels, fewer (with the first weights, made to sum to 1) below. FLIP, a fifth of a second for 384 x 512, is of
every fourth frame of a clip.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence

import numpy as np
import torch

from dit_accel.errors import ConfigError
from dit_accel.pipelines.compare import temporal_error
from dit_accel.pipelines.media import Media

from .store import Figures
from .vmaf import has_vmaf, vmaf

_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli and Bovik 2003
_KERNEL = 11
_AT_ONCE = 8  # frames: torchmetrics keeps ten copies in fp64, seven GB of a clip of 81 frames
_FLIP_EVERY = 4
CPU = torch.device("cpu")


def compare(made: Media, reference: Media, device: torch.device = CPU) -> Figures:
    """Return all figures of a picture or clip against the reference; ConfigError where they are no pair.

    torchmetrics' are computed in fp32 on a CPU, where a clip's take half a minute a core, SSIM in fp64 on a GPU.
    """
    if len(made.frames) != len(reference.frames) or made.image.size != reference.image.size:
        raise ConfigError(f"eval: {_shape(made)} cannot be compared with {_shape(reference)}.")
    ours, theirs = _tensor(made, device), _tensor(reference, device)
    with torch.backends.cudnn.flags(enabled=False):  # cuDNN may round fp32 to TF32
        ratios = [_psnr(a, b) for a, b in zip(ours, theirs, strict=True)]
        if device.type == "cuda":  # its fp32 sums leave a plain white ground a variance below 0: .9996 for equal clips
            ours, theirs = ours.double(), theirs.double()
        alike = [_ssim(a[None], b[None]) for a, b in zip(ours, theirs, strict=True)]
        parts = zip(ours.split(_AT_ONCE), theirs.split(_AT_ONCE), strict=True)
        scales = [score for part in parts for score in _ms_ssim(*part)]
    differing = [ratio for ratio in ratios if ratio is not None]
    several = len(ratios) > 1
    return Figures(
        psnr=_mean(differing) if differing else None,
        ssim=_mean(alike),
        ms_ssim=_mean(scales) if scales else None,
        flip=_flip(ours[::_FLIP_EVERY].float(), theirs[::_FLIP_EVERY].float()) if has_flip() else None,
        temporal_error=temporal_error(made, reference),
        vmaf=vmaf(made, reference) if reference.is_clip and has_vmaf() else None,
        frame_psnr=tuple(ratios) if several else (),
        frame_ssim=tuple(alike) if several else (),
    )


def missing(clip: bool) -> list[str]:
    """Say which figures are left out here, and why."""
    out = [] if has_flip() else ["FLIP is left out: the package flip-evaluator is not installed"]
    if clip and not has_vmaf():
        out.append("VMAF is left out: this ffmpeg has no libvmaf")
    return out


def has_flip() -> bool:
    """Say whether NVIDIA's FLIP evaluator is installed; not every platform has a wheel."""
    return importlib.util.find_spec("flip_evaluator") is not None


def _psnr(a: torch.Tensor, b: torch.Tensor) -> float | None:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    ratio = float(peak_signal_noise_ratio(a, b, data_range=1.0))
    return ratio if math.isfinite(ratio) else None


def _ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    from torchmetrics.functional.image import structural_similarity_index_measure

    score = structural_similarity_index_measure(a, b, data_range=1.0)
    return float(score[0] if isinstance(score, tuple) else score)


def _ms_ssim(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Return it frame by frame, none of them where pictures are too small for two scales."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    side = min(a.shape[-2:])
    scales = max((n for n in range(2, 6) if side > (_KERNEL - 1) * (n - 1) ** 2), default=0)
    if not scales:
        return []
    total = sum(_WEIGHTS[:scales])
    betas = tuple(weight / total for weight in _WEIGHTS[:scales])
    score = multiscale_structural_similarity_index_measure(
        a, b, data_range=1.0, kernel_size=_KERNEL, betas=betas, normalize="relu", reduction="none"
    )
    return score.tolist()


def _flip(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the mean FLIP error, 0 where equal: NVIDIA's evaluator, LDR, at its default 67 pixels a degree."""
    import flip_evaluator

    pairs = zip(*(x.permute(0, 2, 3, 1).cpu().numpy() for x in (b, a)), strict=True)
    return _mean([float(flip_evaluator.evaluate(ref.copy(), test.copy(), "LDR")[1]) for ref, test in pairs])


def _tensor(media: Media, device: torch.device) -> torch.Tensor:
    """Return the frames as float32 [frames, 3, height, width] in 0..1."""
    frames = np.stack([np.asarray(frame.convert("RGB")) for frame in media.frames])
    return torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float() / 255


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _shape(media: Media) -> str:
    return f"{len(media.frames)} frames of {media.image.width}x{media.image.height}"
