"""Offline calibration: what each head of a model needs, seen in a few runs of the unaccelerated model."""

from .run import ROWS, Calibration, Progress, calibrate, check_calibrates

__all__ = ["ROWS", "Calibration", "Progress", "calibrate", "check_calibrates"]
