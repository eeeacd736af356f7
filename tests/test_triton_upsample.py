"""The Triton kernels on upsampled logits, as Triton's interpreter runs them on the CPU."""

from __future__ import annotations

import pytest
import torch
import upsample
from operators import gpu_dtypes, image_layouts, interpreted


@interpreted
@pytest.mark.parametrize(("shape", "size"), upsample.CASES + upsample.EMPTY, ids=str)
@gpu_dtypes
@image_layouts
def test_labels(shape, size, dtype, layout, backend):
    upsample.check_labels(upsample.draw_logits(shape, dtype, layout), size, backend)
