"""The tables: every figure that JSON carries is legible in them."""

import io

import pytest
from rich.console import Console

from d2moe_ext import report

LAYER = {
    "name": "model.layers.0.mlp.experts",
    "gate_up_kept": 60,
    "gate_up_keep": 58,
    "down_kept": 90,
    "down_keep": 84,
    "ranks": {"gate": [16, 8, 8], "up": [16, 16, 16], "down": [24, 16, 24]},
}
PLAN = {
    "total_parameters": 6_350_000,
    "compressed_parameters": 3_801_234,
    "stored_parameters": 3_801_234,
    "ratio": 0.4014,
    "delta_share": 0.4733,
    "bytes_before": 12_700_000,
    "bytes_after": 7_650_000,
    "active_parameters_before": 2_000_000,
    "active_parameters_after": 1_500_000,
    "flops_per_token_before": 4_000_000,
    "flops_per_token_after": 3_000_000,
    "bytes_per_token_before": 4_000_000,
    "bytes_per_token_after": 3_000_000,
    "layers": [LAYER, LAYER | {"name": "model.layers.1.mlp.experts"}],
}


def rendered(renderable, width=140):
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("value", "count", "size"),
    [
        (0, "0", "0 B"),
        (999, "999", "999 B"),
        (1000, "1.00 k", "1.00 kB"),
        (12_345, "12.3 k", "12.3 kB"),
        (999_999, "1.00 M", "1.00 MB"),
        (46.70e9, "46.7 G", "46.7 GB"),
        (5e15, "5000 T", "5000 TB"),
    ],
)
def test_figures_keep_three_digits(value, count, size):
    assert report.human_count(value) == count
    assert report.human_bytes(value) == size


def test_rank_range():
    assert report.rank_range([8, 8]) == "8"
    assert report.rank_range([16, 8, 24]) == "8-24"


def test_plan_shows_costs_and_folds_equal_layers():
    text = rendered(report.plan_tables(PLAN, "a model"))
    assert "6,350,000 parameters become 3,801,234" in text
    assert "47.33 %" in text
    assert "7.65 MB" in text
    assert "0.750" in text  # active parameters, after / before
    assert "60 stored, 58 used" in text
    assert "(2 layers)" in text
    assert "8-16" in text


def test_unequal_layers_have_a_row_each():
    other = LAYER | {"name": "model.layers.1.mlp.experts", "down_keep": 83}
    text = rendered(report.plan_tables(PLAN | {"layers": [LAYER, other]}, "a model"))
    assert "model.layers.0.mlp.experts" in text
    assert "model.layers.1.mlp.experts" in text
    assert "90 stored, 83 used" in text


def test_compression_shows_bytes_against_plan_and_raised_ridges():
    errors = {"gate": [0.5, 0.3], "up": [0.25, 0.25], "down": [0.1, 0.2]}
    record = {
        "model": "a model",
        "plan": PLAN,
        "bytes_on_disk": 7_688_250,
        "raised_ridges": [{"layer": "model.layers.1", "projection": "down", "expert": 3, "ridge": 1e-4}],
        "deltas": {LAYER["name"]: {name: {"relative_error": values} for name, values in errors.items()}},
    }
    text = rendered(report.compression_tables(record, "out"))
    assert "7.69 MB on disk, +0.50 % from the plan: out" in text
    assert "Raised ridge 1e-04: down of expert 3 in model.layers.1" in text
    for mean in ("0.400", "0.250", "0.150"):
        assert mean in text


def test_evaluation_says_whether_dynamic_pruning_was_on():
    record = {
        "perplexity": 12.345678,
        "tokens": 12345,
        "seqlen": 256,
        "stride": 128,
        "dynamic_pruning": True,
        "native_operators": False,
        "seconds": 1.25,
    }
    text = rendered(report.evaluation_table(record))
    assert "12.3457" in text
    assert "12,345" in text
    assert text.split("dynamic pruning")[1].split()[0] == "on"
    without = rendered(report.evaluation_table(record | {"dynamic_pruning": False}))
    assert without.split("dynamic pruning")[1].split()[0] == "off"


def test_inspection_shows_the_compression_and_each_layer():
    record = {
        "format_version": 1,
        "parameters": 3_801_234,
        "bytes_on_disk": 7_650_000,
        "compression": {"ratio": 0.4, "merge": "fisher"},
        "layers": [LAYER | {"num_experts": 8, "num_bases": 2, "parameters": 123_456, "bytes": 246_912}],
    }
    text = rendered(report.inspection_tables(record, "out"))
    for part in ("3.80 M", "7.65 MB", "fisher", "123 k", "60 stored, 58 used"):
        assert part in text


def test_demo_has_one_row_a_model_and_passages_only_where_written():
    row = {
        "label": "original",
        "parameters": 6_350_000,
        "bytes_on_disk": 12_712_345,
        "bytes_planned": 12_712_300,
        "perplexity": 17.25,
        "prefill": 4321.4,
        "generate": 87.6,
        "prompt": "def f",
        "passage": "(x): [return]",
    }
    compared = row | {"label": "mean", "prefill": None, "generate": None, "prompt": None, "passage": None}
    result = {"rows": [row, compared], "tokens": 1000, "window": 256, "calibration_tokens": 2048, "seconds": 12.4}
    text = rendered(report.demo_tables(result))
    for part in ("12,712,345", "12,712,300", "17.250", "4,321", "88", "def f(x): [return]", "12 s in all"):
        assert part in text
    assert text.count("original") == 2  # a row and a passage
    assert text.count("mean") == 1  # a row
