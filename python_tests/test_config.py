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
        ({"ratio": 0.4, "preset": "fast"}, "preset must be one of quality, performance, throughput, got 'fast'."),
        (
            {"ratio": 0.4, "merge": "median"},
            "merge must be one of fisher, fisher_frequency, frequency, mean, got 'median'.",
        ),
        ({"ratio": 0.4, "count": "all"}, "count must be one of stored, paper, got 'all'."),
        ({"ratio": 0.4, "factor_dtype": "int4"}, "factor_dtype must be one of model, int8, got 'int4'."),
        ({"ratio": 0.4, "alternations": -1}, "alternations must be at least 0, got -1."),
        (
            {"ratio": 0.4, "fold": False},
            "alternations needs fold=True, which takes deltas against the base it refits, got False.",
        ),
        (
            {"ratio": 0.4, "preset": "performance", "ranks": "global"},
            "ranks='global' needs decomposition='two_sided', whose singular values",
        ),
        (
            {"ratio": 0.4, "preset": "performance", "sequential": True},
            "sequential needs dynamic_pruning=False, as a layer that prunes by the batch passes on something else in each, "
            "got True.",
        ),
        (
            {"ratio": 0.4, "decomposition": "plain", "sequential": True},
            "sequential needs decomposition='two_sided' or 'whitened', which weigh what is left out with the Gram matrices "
            "that it takes anew, got 'plain'.",
        ),
        (
            {"ratio": 0.4, "decomposition": "activation_aware", "sequential": True},
            "sequential needs decomposition='two_sided' or 'whitened'",
        ),
    ],
)
def test_a_bad_option_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        CompressionConfig(**options)
    assert str(caught.value).count(". ") == 0


def test_presets_are_the_papers():
    """Equations 4 to 9 and Table 12: nothing of ours."""
    for preset, sparsity in (("performance", 0.1), ("throughput", 0.6)):
        assert CompressionConfig(0.4, preset=preset).to_dict() == {
            "ratio": 0.4,
            "preset": preset,
            "base_sparsity": sparsity,
            "count": "stored",
            "merge": "fisher",
            "decomposition": "whitened",
            "ranks": "uniform",
            "fold": False,
            "joint_gate_up": False,
            "gauge_fixed": False,
            "factor_dtype": "model",
            "alternations": 0,
            "dynamic_pruning": True,
            "sequential": False,
            "num_bases": 1,
        }


def test_an_option_stands_in_place_of_its_presets():
    config = CompressionConfig(0.4, preset="throughput", base_sparsity=0.3, merge="mean")
    assert (config.base_sparsity, config.merge, config.decomposition) == (0.3, "mean", "whitened")
    assert CompressionConfig(0.4).base_sparsity is None
    assert CompressionConfig(0.4).factor_dtype == "model"
    assert CompressionConfig(**CompressionConfig(0.4).to_dict()) == CompressionConfig(0.4)


def test_one_sided_deltas_of_the_quality_preset_take_uniform_ranks():
    assert CompressionConfig(0.4, decomposition="whitened").ranks == "uniform"
    with pytest.raises(ValueError, match="needs decomposition='two_sided'"):
        CompressionConfig(0.4, decomposition="whitened", ranks="global")
