"""What moves in a clip, and how: a tracker on OpenCV that knows nothing of captions.

The ground's colours are read at the clip's border, what differs from them is the thing; its centre, size and turn
over time decide the motion.
"""

from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

BORDER = 10  # pixels at the top that no whole thing reaches
DIFFERS = 40.0  # distance in RGB from the ground's colours
SPECK = 0.002  # share of the canvas below which a mask counts as empty
POLAR = (96, 360)  # radius and angle samples of a turn's measurement


@dataclass(frozen=True)
class Blob:
    """A thing in one frame: centre, bounding box (left, top, right, bottom) and area, in pixels."""

    x: float
    y: float
    box: tuple[int, int, int, int]
    area: float


@dataclass(frozen=True)
class Track:
    """Blobs of the frames in which a thing was seen, beside those frames' numbers."""

    frames: list[int]
    blobs: list[Blob]

    def path(self) -> np.ndarray:
        return np.array([(b.x, b.y) for b in self.blobs])

    def boxes(self) -> np.ndarray:
        return np.array([b.box for b in self.blobs], dtype=float)


def ground_colours(clip: np.ndarray) -> np.ndarray:
    """One or two colours of the border, [n, 3]."""
    pixels = clip[::8, :BORDER, ::4].reshape(-1, 3).astype(np.float32)
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 0.5)
    _, labels, centres = cv2.kmeans(pixels, 2, np.zeros((0,), np.int32), criteria, 1, cv2.KMEANS_PP_CENTERS)
    apart = np.linalg.norm(centres[0] - centres[1]) > 12 and 0.1 < labels.mean() < 0.9
    return centres if apart else pixels.mean(0, keepdims=True)


def distance(frame: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Of each pixel from the colours, or from the line between the two."""
    pixels = frame.astype(np.float32)
    if len(colours) == 1:
        return np.linalg.norm(pixels - colours[0], axis=-1)
    line = colours[1] - colours[0]
    along = np.clip((pixels - colours[0]) @ line / (line @ line), 0, 1)
    return np.linalg.norm(pixels - colours[0] - along[..., None] * line, axis=-1)


def mask_of(frame: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The thing with its holes filled: all that the ground does not reach from the border. uint8, 0 or 1."""
    differs = (distance(frame, colours) > DIFFERS).astype(np.uint8)
    differs = cv2.morphologyEx(differs, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    outlines, _ = cv2.findContours(differs, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros_like(differs)
    cv2.drawContours(filled, [o for o in outlines if cv2.contourArea(o) > 30], -1, 1, cv2.FILLED)
    return filled


def blob_of(mask: np.ndarray) -> Blob | None:
    moments = cv2.moments(mask, binaryImage=True)
    if moments["m00"] < SPECK * mask.size:
        return None
    left, top, width, height = cv2.boundingRect(mask)
    centre = moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]
    return Blob(*centre, (left, top, left + width, top + height), moments["m00"])


def track(masks: list[np.ndarray], rows: slice = slice(None)) -> Track:
    """Follow what lies in the given rows."""
    found = [(i, blob_of(np.ascontiguousarray(m[rows]))) for i, m in enumerate(masks)]
    return Track([i for i, b in found if b], [b for _, b in found if b])


def polar(frame: np.ndarray, mask: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    """The thing unrolled around a centre, angle along the rows; what is not the thing is black."""
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
    seen = (255 - grey + 40) * mask
    return cv2.warpPolar(seen, POLAR, (float(centre[0]), float(centre[1])), radius, cv2.WARP_POLAR_LINEAR)


def turn_between(first: np.ndarray, second: np.ndarray) -> float:
    """Degrees by which the second unrolled picture is turned clockwise, within 60, by circular correlation."""
    a, b = (np.fft.rfft(p - p.mean(0), axis=0) for p in (first, second))
    match = np.fft.irfft((a.conj() * b).sum(1), n=len(first))
    shifts = np.arange(-60, 61)
    return float(shifts[np.argmax(match[shifts % len(first)])])


def total_turn(clip: np.ndarray, masks: list[np.ndarray], found: Track, step: int = 4) -> float:
    """Degrees turned clockwise over the clip, around the mean centre of the bounding boxes."""
    boxes = found.boxes()
    centre = np.array([(boxes[:, 0] + boxes[:, 2]).mean() / 2, (boxes[:, 1] + boxes[:, 3]).mean() / 2])
    radius = 0.75 * max((boxes[:, 2] - boxes[:, 0]).mean(), (boxes[:, 3] - boxes[:, 1]).mean())
    unrolled = [polar(clip[i], masks[i], centre, radius) for i in found.frames[::step]]
    return sum(turn_between(a, b) for a, b in pairwise(unrolled))


def ground_drift(clip: np.ndarray) -> float:
    """Pixels by which the border's pattern moves right from frame to frame (median)."""
    rows = clip[:, :BORDER].astype(np.float32).mean(axis=(1, 3))
    rows = cv2.GaussianBlur(rows - rows.mean(1, keepdims=True), (0, 0), 4, sigmaY=0.001)
    a, b = np.fft.rfft(rows[:-2], axis=1), np.fft.rfft(rows[2:], axis=1)
    match = np.fft.irfft(a.conj() * b, n=rows.shape[1], axis=1)
    shifts = np.arange(-24, 25)
    return float(np.median(shifts[np.argmax(match[:, shifts], axis=1)])) / 2


def ends(values: np.ndarray, share: float = 0.12) -> tuple[np.ndarray, np.ndarray]:
    """Means over the first and the last few."""
    count = max(1, round(share * len(values)))
    return values[:count].mean(0), values[-count:].mean(0)


def swings(height: np.ndarray, room: float) -> int:
    """How often a path turns by more than `room`."""
    count, edge, rising = 0, height[0], None
    for y in height:
        if rising in (None, True) and y < edge - room:
            count, rising, edge = count + (rising is True), False, y
        elif rising in (None, False) and y > edge + room:
            count, rising, edge = count + (rising is False), True, y
        elif (rising is True and y > edge) or (rising is False and y < edge):
            edge = y
    return count


def motion_of(clip: np.ndarray) -> str:
    """The name of the motion (see MOTIONS) a clip shows, or "nothing". Clips are uint8 RGB [T, H, W, 3]."""
    colours = ground_colours(clip)
    masks = [mask_of(frame, colours) for frame in clip]
    found = track(masks)
    if len(found.frames) < len(clip) // 2:
        return "nothing"
    if len(colours) == 2:
        drift = ground_drift(clip)
        return "before left" if drift < -0.5 else "before right" if drift > 0.5 else "still"
    middle = clip.shape[1] // 2
    sides = [track(masks, rows) for rows in (slice(0, middle), slice(middle, None))]
    if passes(sides, len(clip)):
        return "passing"
    return single_motion(clip, masks, found)


def passes(sides: list[Track], frames: int) -> bool:
    """Whether the upper thing goes right while the lower goes left."""
    if any(len(s.frames) < frames // 2 for s in sides):
        return False
    upper, lower = (np.subtract(*reversed(ends(s.path())))[0] for s in sides)
    return upper > 60 and lower < -60


def single_motion(clip: np.ndarray, masks: list[np.ndarray], found: Track) -> str:
    path, boxes = found.path(), found.boxes()
    extent = np.hypot(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    first, last = ends(extent)
    if last / first > 1.5:
        return "grow"
    if last / first < 1 / 1.5:
        return "shrink"
    start, stop = ends(path)
    right, down = stop - start
    size = float(np.median(extent)) / 2**0.5
    if swings(path[:, 1], 0.2 * size) >= 3:
        return "bounce"
    if max(abs(right), abs(down)) > 0.35 * size:
        if abs(right) > abs(down):
            return "right" if right > 0 else "left"
        return "down" if down > 0 else "up"
    turn = total_turn(clip, masks, found)
    return "clockwise" if turn > 120 else "counterclockwise" if turn < -120 else "still"


def subject_crop(clip: np.ndarray, motion: str, size: int) -> np.ndarray:
    """The first thing of a clip on white, squared and brought to `size`, from a frame in which it stands upright.

    `motion` is the one asked for: a spinning thing is upright at the start, a growing one largest at the end, and
    of two the first is in the upper half.
    """
    colours = ground_colours(clip)
    index = {"clockwise": 0, "counterclockwise": 0, "shrink": 0, "grow": -1}.get(motion, len(clip) // 2)
    frame = clip[index][: clip.shape[1] // 2] if motion == "passing" else clip[index]
    mask = mask_of(frame, colours)
    blob = blob_of(mask)
    if blob is None:
        return np.full((size, size, 3), 255, np.uint8)
    soft = np.clip(distance(frame, colours) / DIFFERS, 0, 1)
    inside = cv2.dilate(mask, np.ones((5, 5), np.uint8)) * np.maximum(soft, cv2.erode(mask, np.ones((5, 5), np.uint8)))
    cut = 255 - (255 - frame.astype(np.float32)) * inside[..., None]
    left, top, right, bottom = blob.box
    half = 0.54 * max(right - left, bottom - top)
    x, y = (left + right) / 2, (top + bottom) / 2
    scale = size / (2 * half)
    matrix = np.array([[scale, 0, scale * (half - x)], [0, scale, scale * (half - y)]])
    warped = cv2.warpAffine(cut, matrix, (size, size), flags=cv2.INTER_AREA, borderValue=(255.0, 255.0, 255.0))
    return warped.round().astype(np.uint8)
