"""The stored truths of the gate are what the libraries that are named make today."""

from __future__ import annotations

import numpy as np
import pytest

from .conftest import load_tool


@pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
def test_the_stored_vectors_are_what_others_make() -> None:
    tool = load_tool("third_party_vectors")
    made = tool.vectors() | tool.opencv()
    with np.load(tool.STORED) as stored:
        assert set(stored.files) == set(made)
        for name, array in made.items():
            if name.endswith("content"):
                continue  # a PNG's bytes depend on the version of zlib; its pixels do not
            assert stored[name].dtype == array.dtype, name
            atol = 2e-5 if array.dtype == np.float32 else 0
            np.testing.assert_allclose(stored[name], array, rtol=0, atol=atol, err_msg=name)
