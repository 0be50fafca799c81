"""Options are checked where they are given."""

import re

import pytest

from d2moe_ext.config import CompressionConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "ratio must lie between 0 and 1, got 0.0."),
        ({"ratio": 1.0}, "ratio must lie between 0 and 1, got 1.0."),
        ({"ratio": float("nan")}, "ratio must lie between 0 and 1, got nan."),
        ({"ratio": 0.4, "base_sparsity": 1.0}, "base_sparsity must be at least 0 and below 1, got 1.0."),
        ({"ratio": 0.4, "num_bases": 0}, "num_bases must be at least 1, got 0."),
        ({"ratio": 0.4, "preset": "fast"}, "preset must be one of performance, throughput, got 'fast'."),
        (
            {"ratio": 0.4, "merge": "median"},
            "merge must be one of fisher, fisher_frequency, frequency, mean, got 'median'.",
        ),
        ({"ratio": 0.4, "count": "all"}, "count must be one of stored, paper, got 'all'."),
        ({"ratio": 0.4, "ranks": "global"}, "ranks='global' needs decomposition='two_sided', whose singular values"),
    ],
)
def test_a_bad_option_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        CompressionConfig(**options)
    assert str(caught.value).count(". ") == 0


def test_presets_are_the_papers():
    assert CompressionConfig(0.4).sparsity == 0.1
    assert CompressionConfig(0.4, preset="throughput").sparsity == 0.6
    assert CompressionConfig(0.4, preset="throughput", base_sparsity=0.3).to_dict()["base_sparsity"] == 0.3
