"""What the objects of `augment` become, and what the kernels read: rows of numbers.

A row is (code, probability, six numbers of its own). Codes up to `LAST_GEOMETRY` move pixels, the
others change intensities. The module holds no code, so that describing an augmentation does not
load numba.
"""

from __future__ import annotations

FLIP, DIHEDRAL, ROTATE, SHIFT, ZOOM, CROP, ELASTIC = range(1, 8)
LAST_GEOMETRY = ELASTIC
CONTRAST, BRIGHTNESS, GAMMA, NOISE, BLUR, LOW_RESOLUTION = range(8, 14)

#: Columns of a row: code, probability, numbers.
ROW_NUMBERS = 6
ROW_LENGTH = 2 + ROW_NUMBERS

#: What an image is outside its borders.
EDGE, CONSTANT, MINIMUM = range(3)

LINEAR, CUBIC = 1, 3

#: Places in the settings of a plan.
INTERPOLATION, OUTSIDE, FILL, ASPECT, SAMPLES = range(5)

#: Places in what maps stored to served intensities: (clip(x, low, high) - center) * scale.
LOW, HIGH, CENTER, SCALE = range(4)
