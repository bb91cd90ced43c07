"""Embeddings as vectors of length 1. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence


def unit(vector: Sequence[float], dimensions: int = 0) -> list[float]:
    """`vector` with length 1, cut to its first `dimensions` before (0: not at all). Models trained for it put what
    matters most there."""
    kept = vector[:dimensions] if dimensions > 0 else vector
    length = math.hypot(*kept)
    return [each / length for each in kept] if length > 0 else list(kept)
