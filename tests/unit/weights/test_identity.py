"""What a file's header may say of a model: only what is sound counts, since anybody can write a header."""

import json

import pytest

from fluxcanvas.flux_runtime.variants import VARIANTS
from fluxcanvas.flux_runtime.weights.identity import HEADER, header_of, told_by


def told(content):
    return told_by({HEADER: content if isinstance(content, str) else json.dumps(content)})


def test_what_is_written_is_read_back(demo):
    found = told_by(header_of(demo.model))
    assert found["variant"] == "dev" and found["transformer"] == {"axes_dims_rope": [4, 14, 14]}
    assert found["scheduler"]["use_dynamic_shifting"] is False and found["scheduler"]["shift"] == 1.0


@pytest.mark.parametrize(
    "content", ["", "[" * 100_000, "null", [], {"variant": "xyz"}, {"variant": ["dev"]}, {"scheduler": 3}]
)
def test_nonsense_says_nothing(content):
    assert told(content) == {}


def test_a_known_variant_counts_and_of_a_transformer_only_its_axes():
    named = {"variant": "kontext", "transformer": {"quantization_config": {}, "axes_dims_rope": [2, 3, 3]}, "other": 1}
    assert "kontext" in VARIANTS
    assert told(named) == {"variant": "kontext", "transformer": {"axes_dims_rope": [2, 3, 3]}}
