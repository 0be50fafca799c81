"""The page of times says what the saved results say, and nothing else."""

from __future__ import annotations

import json

import pytest
from bench_helpers import layer_row, record
from gpu_records import FILL, bench_record, check_record, gpu_layer_row, part_row, part_rows, profile_row, profile_rows

from benchmarks.performance import __main__ as program
from benchmarks.performance.claims import all_verdicts
from benchmarks.performance.gpu import gpu_section
from benchmarks.performance.gpu_claims import layer_verdicts, part_verdicts
from benchmarks.performance.kernel_names import short_names
from benchmarks.performance.page import page, write_page
from benchmarks.performance.records import read_gpu_records, read_records, rows_of

LAYER = [
    layer_row("eager", share_of_floor=0.4, median_ms=20.0),
    layer_row("uncompressed", speed_over_hf=2.1),
    layer_row("throughput 0.6", speed_over_hf=4.5, bytes=900_000, floor_ms=3.0),
    layer_row("throughput 0.6, dynamic", speed_over_hf=3.9, bytes=700_000, saved_ms=0.19, share_of_floor=0.7, floor_ms=3.0),
]
GROWTH = [
    {
        "shape": "growth", "swept": "rank", "value": n, "tokens": 64, "experts": 64, "rank": n, "kept": 0.75,
        "hidden_size": 2048, "intermediate_size": 1408, "top_k": 6, "dtype": "bfloat16", "contender": "compressed",
        "kind": "native", "median_ms": float(n * n), "floor_ms": float(n), "note": None,
    }
    for n in (16, 32)
]  # fmt: skip


def verdicts(rows):
    return {(verdict.claim, verdict.shape): verdict for verdict in all_verdicts(rows_of([record("layer", rows)], "layer"))}


def one(rows, part):
    (found,) = [verdict for (claim, _), verdict in verdicts(rows).items() if part in claim]
    return found


def test_share_of_the_floor():
    verdict = one(LAYER, "1 token, bfloat16: time at most floor / 0.75")
    assert (verdict.holds, verdict.numbers) == (False, "2 of 3; least 0.70 (throughput 0.6, dynamic)")
    assert one(LAYER[:3], "floor / 0.75").holds
    many = [layer_row("uncompressed", tokens=2048, share_of_floor=0.71)]
    assert one(many, "2,048 tokens, bfloat16: time at most floor / 0.70").holds
    assert not [claim for claim, _ in verdicts([layer_row("uncompressed", dtype="float32")]) if "floor /" in claim]


def test_a_wrong_output_does_not_pass_unseen():
    assert one(LAYER, "every output").holds
    wrong = layer_row("quality 0.4", note="wrong: differs from x by 1.0e+00", median_ms=None, share_of_floor=None)
    verdict = one([*LAYER, wrong], "every output")
    assert (verdict.holds, verdict.numbers) == (False, "quality 0.4, bfloat16, 1 token")


def test_speed_on_mixtral():
    assert one(LAYER, "plain: at least 2 times").holds
    verdict = one(LAYER, "throughput 0.6: at least 4 times")
    assert (verdict.holds, verdict.numbers) == (False, "1 of 2; least 3.90 (throughput 0.6, dynamic)")
    assert not [claim for claim, _ in verdicts([row | {"shape": "other"} for row in LAYER]) if "times as fast" in claim]


def test_what_dynamic_pruning_saves():
    # 200,000 bytes at 1 GB/s are 0.2 ms, of which 0.19 ms are saved.
    verdict = one(LAYER, "dynamic pruning")
    assert (verdict.holds, verdict.numbers) == (True, "throughput 0.6: 0.95")
    assert not one([*LAYER[:3], LAYER[3] | {"saved_ms": 0.15}], "dynamic pruning").holds


def test_faster_where_floors_say_so():
    # The plain floor is 8 ms: 2.7 times that of the compressed layer, and the uncompressed layer's own.
    verdict = one(LAYER, "wherever floors say")
    assert (verdict.holds, verdict.numbers) == (True, "2 of 2; least 3.90 (throughput 0.6, dynamic)")
    slower = [*LAYER[:2], LAYER[2] | {"speed_over_hf": 0.9}]
    assert not one(slower, "wherever floors say").holds
    assert not [claim for claim, _ in verdicts([*LAYER[:2], LAYER[2] | {"floor_ms": 7.0}]) if "wherever" in claim]


def test_plain_is_never_much_slower():
    rows = [LAYER[0], layer_row(speed_over_hf=0.98), layer_row(speed_over_hf=0.96, tokens=8, dtype="float32")]
    verdict = one(rows, "uncompressed: never below")
    assert (verdict.holds, verdict.numbers) == (False, "1 of 2; least 0.96 (uncompressed, float32, 8 tokens)")
    assert one(rows[:2], "uncompressed: never below").holds


def test_page(tmp_path):
    skipped = layer_row("batched_mm", note="skipped: too large", median_ms=None, share_of_floor=None, speed_over_hf=None)
    again = LAYER[0] | {"group": 1, "median_ms": 99.0}
    model = record("model", [{"model": "a|b", "tokens_per_second": 12.345, "patched": True, "count": 3000, "note": None}])
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "claims.md").write_text("What was out of reach.\n")
    records = [record("layer", [*LAYER, skipped, again]), record("growth", GROWTH), model]
    text = page(records, {"layer": "![layer](performance/layer.png)"}, notes)
    assert "| eager | 20.0 · 1.00× · 0.40 |" in text
    assert "| batched_mm | – |" in text
    assert "- batched_mm, 1 token: skipped: too large" in text
    assert "99.0" not in text
    assert "What was out of reach." in text
    assert "![layer](performance/layer.png)" in text
    assert "- floors at the start: 1.0 GB/s (sum of float32); 1 GFLOP/s in float32; 2 GFLOP/s in bfloat16" in text
    assert (
        "| compressed | bfloat16 | rank | 16 to 32 | 256.00 to 1024.00 | 2.00 | 1.00 | **exceeds the floor's by 1.00** |"
        in text
    )
    assert "rank 16" not in text
    assert "| model | tokens per second | patched | count | note |" in text
    assert "| a\\|b | 12.3 | True | 3,000 | – |" in text


def test_write_page(tmp_path):
    write_page([record("layer", LAYER), record("growth", GROWTH)], tmp_path / "docs" / "performance.md")
    text = (tmp_path / "docs" / "performance.md").read_text()
    assert text.startswith("# Performance\n\nGenerated by")
    for kind in ("layer", "growth"):
        assert (tmp_path / "docs" / "performance" / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
        assert f"![{kind}](performance/{kind}.png)" in text


def save(folder, name, value):
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def run_program(monkeypatch, folder):
    options = ["--results", str(folder), "--gpu-results", str(folder / "gpu"), "--write", str(folder / "page.md")]
    monkeypatch.setattr("sys.argv", ["performance", *options])
    return program.main()


def test_program(tmp_path, monkeypatch, capsys):
    assert run_program(monkeypatch, tmp_path) == 2
    assert "--results must be a folder with saved results" in capsys.readouterr().err
    save(tmp_path, "a.json", record("layer", LAYER))
    model = record("model", [{"model": "x"}])
    save(tmp_path, "b.json", {key: value for key, value in model.items() if key not in ("kind", "floors", "versions")})
    assert run_program(monkeypatch, tmp_path) == 0
    assert "## Whole models" in (tmp_path / "page.md").read_text()
    assert "No GPU was at hand so far" in (tmp_path / "page.md").read_text()
    (tmp_path / "gpu").mkdir()
    assert run_program(monkeypatch, tmp_path) == 0
    save(tmp_path / "gpu", "gpu-check-some-gpu.json", check_record())
    assert run_program(monkeypatch, tmp_path) == 0
    text = (tmp_path / "page.md").read_text()
    assert "### Checked on Some GPU" in text
    assert "No GPU was at hand" not in text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "b.json must be JSON"),
        ({"machine": "", "command": "", "date": ""}, "b.json must have the entries machine, command, date, rows, got none"),
        ([], "b.json must have the entries"),
        (record("layer", LAYER[:1]), "Results must hold every cell once, got Mixtral-8x7B, bfloat16, 1, eager twice."),
    ],
)
def test_records_that_cannot_stand_on_one_page(tmp_path, value, message):
    save(tmp_path, "a.json", record("layer", LAYER))
    save(tmp_path, "b.json", value)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path)


def line_of(text, start):
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return found


def test_no_gpu_so_far(tmp_path):
    text = gpu_section([], tmp_path)
    assert line_of(text, "column_select") == "| column_select | built and loaded, not yet run |"
    assert line_of(text, "moe_forward") == "| moe_forward | built and loaded, not yet run |"


def test_gpu_check(tmp_path):
    text = gpu_section([check_record()], tmp_path)
    assert "- commit 0123456789, 2026-01-31\n- Some GPU: compute capability 9.0, 80 GiB, driver 1.2" in text
    assert line_of(text, "column_select") == "| column_select | ran | 2 passed |"
    assert line_of(text, "gram_update_") == "| gram_update_ | ran | **1 passed, 1 failed: failed** |"
    assert line_of(text, "moe_forward") == "| moe_forward | not written | none |"
    assert line_of(text, "build").startswith("| build | passed |")
    assert line_of(text, "memcheck") == "| memcheck | passed | ERROR SUMMARY: 0 errors |"
    assert line_of(text, "racecheck") == "| racecheck | **failed** | not found: compute-sanitizer |"
    assert "did not come to its end" not in text
    broken = check_record(steps=[], tests=[], operators={}, complete=False)
    text = gpu_section([broken], tmp_path)
    assert line_of(text, "column_select") == "| column_select | not run | **none: not run** |"
    assert "**The check did not come to its end.**" in text


def test_gpu_bench(tmp_path):
    (tmp_path / "gpu.md").write_text("What was learnt.\n")
    text = gpu_section([check_record(), bench_record()], tmp_path)
    assert text.index("### Checked on Some GPU") < text.index("### Measured on Some GPU") < text.index("What was learnt.")
    assert "3,000 GB/s copied, bytes read and written; 2,900 GB/s read (sum of float32); products at 800 TFLOP/s" in text
    assert line_of(text, "gram_update_, a") == (
        "| gram_update_, a | 0.500 | 65% of the rate of products in bfloat16 | at least 60% of the ceiling | holds |"
    )
    assert line_of(text, "column_select, b") == ("| column_select, b | 0.0200 | 20.0 µs | at most 15 µs | **does not hold** |")
    assert line_of(text, "whitened_svd, c").endswith("| at least 10 times as fast as the loop | holds |")
    assert "12.0 times as fast as the loop, error 1.0001 times the best" in text
    assert line_of(text, "fisher_merge_, d") == "| fisher_merge_, d | – | – | – | failed: no memory |"
    assert "#### Mixtral-8x7B, bfloat16" in text
    assert line_of(text, "throughput 0.6, dynamic, graph") == "| throughput 0.6, dynamic, graph | 2.00 · 1.00× · 0.80 |"
    assert "- batched_mm, 1 token: failed: too large" in text
    assert "| throughput 0.6, dynamic | 1 · 0.00100 |" in text
    assert "- layer, Qwen3-30B-A3B, 1: failed: lost" in text


def test_parts_and_profiles_of_a_gpu(tmp_path):
    text = gpu_section([bench_record()], tmp_path)
    row = "| low-rank products | Mixtral-8x7B, 8,192 pairs | 170 | 900 | 20% | 250 = 100 + 150 | 66% |"
    assert row in text
    assert "| sum over experts | Mixtral-8x7B, throughput 0.6, dynamic, 64 tokens | – | – | – | 3.00 | 120% |" in text
    assert text.count("- sparse base: the call runs also zeros.") == 1
    assert "- sum over experts, Mixtral-8x7B, throughput 0.6, dynamic, combine_tokens: failed: no kernel" in text
    assert (
        "#### Mixtral-8x7B, throughput 0.6, dynamic: kernels of a forward\n\n| runs · µs · share | 1 token | 64 tokens |"
        in text
    )
    assert "| all kernels | 50.0 of 100 | 100 of 200 |" in text
    assert "| `grouped_product<16 1 64>` | 6 · 50.0 · 100% | – |" in text
    assert "| `grouped_product<128 2 32>` | – | 2 · 60.0 · 60% |" in text
    assert line_of(text, "others") == "| others | – | 1 · 0.500 · 0% |"
    assert "- profile, Mixtral-8x7B, 512 tokens: failed: the profiling process: exit code -11" in text
    assert "- profile, Qwen3-30B-A3B: failed: lost" in text
    assert "- part, sparse base: failed: no memory" in text


def part_claims(rows, profiles=()):
    return {verdict.claim: (verdict.holds, verdict.numbers) for verdict in part_verdicts(rows, list(profiles))}


def test_claims_on_parts():
    found = part_claims([row for row in part_rows() if "part" in row], [row for row in profile_rows() if "shape" in row])
    low_rank = "low-rank products, 8,192 pairs, ranks about 256 and more: at least 60% of the rate of products in bfloat16"
    layer = "throughput 0.6, dynamic"
    assert found == {
        "routing, 64 tokens: sorted in at most 10 µs": (False, "1 of 2; farthest 11.0 µs (uncompressed, sort_rows)"),
        low_rank: (True, "1 of 1; farthest 66% (8,192 pairs)"),
        "sparse base, at most 16 tokens: at least 75% of the bandwidth": (False, "1 of 2; farthest 70% (half)"),
        "sparse base, half of the channels: at most 0.6 times the time of all": (False, "0 of 1; farthest 0.62 times (half)"),
        "gated activation, 4,096 tokens: at least 80% of the copy bandwidth": (
            True, f"1 of 1; farthest 85% ({layer}, weighted_activation)"
        ),
        "sum over experts, 4,096 tokens: at least 80% of the copy bandwidth": (
            False, f"0 of 1; farthest not measured ({layer}, combine_tokens)"
        ),
        "routing, at most 4 tokens: nothing is sorted": (False, "1 of 2; sorted: uncompressed"),
    }  # fmt: skip


def test_claims_on_parts_at_their_limits():
    sizes = {"rank": 512, "pairs": 8192, "case": "a"}
    (claim,) = part_claims([part_row("low-rank products", **sizes, call_share=0.61, own_note="failed: no profiler")]).values()
    assert claim == (True, "1 of 1; farthest 61% of the whole call (a)")
    (claim,) = part_claims([part_row("low-rank products", **sizes, call_share=0.61, own_share=0.59)]).values()
    assert claim == (False, "1 of 1; farthest 59% (a)".replace("1 of", "0 of", 1))
    (claim,) = part_claims([part_row("low-rank products", rank=256, case=None, note="failed: no memory")]).values()
    assert claim == (False, "0 of 1; farthest not measured ()")
    assert part_claims([part_row("low-rank products", rank=128, own_share=0.9)]) == {}
    half = part_row("sparse base", tokens=16, keep=2, channels=4, call_share=0.75, over_all=0.6)
    assert [holds for holds, _ in part_claims([half]).values()] == [True, True]
    assert part_claims([], [profile_row("a", 5, ("sort_rows", 1, 1.0))]) == {}
    unsorted = part_claims([], [profile_row("a", 4, ("b", 1, 1.0)), profile_rows()[3]])
    assert list(unsorted.values()) == [(True, "1 of 1")]


def test_short_names_of_kernels():
    gemv = "std::enable_if<!(T7), void>::type internal::gemvx::kernel<int, int, __nv_bfloat16, (bool)0>(T13)"
    names = {
        "d2moe::kernels::(anonymous namespace)::sort_rows(d2moe::kernels::MoePairs, int)": "sort_rows",
        "void d2moe::<unnamed>::combine_tokens<__nv_bfloat16, 8>(d2moe::CombineTokens)": "combine_tokens",
        "void (anonymous namespace)::softmax<float>(float (*)(float))": "softmax",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT": "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_gemm>(cutlass_80_tensorop_bf16_gemm::Params)": "Kernel2<"
        "cutlass_80_tensorop_bf16_gemm>",
        gemv: "kernel<int int __nv_bfloat16 bool 0>",
        "Memcpy DtoD (Device -> Device)": "Memcpy DtoD (Device -> Device)",
        "Memset (Device)": "Memset (Device)",
        "_ZN5d2moe9base_sumsE": "_ZN5d2moe9base_sumsE",
        FILL: "vectorized_elementwise_kernel<4 FillFunctor int array char …",
        "void at::native::vectorized_elementwise_kernel<4, at::native::Cast<long>>(int)": "vectorized_elementwise_kernel<"
        "4 Cast long>",
    }
    assert short_names(names) == names
    assert short_names([FILL]) == {FILL: "vectorized_elementwise_kernel"}
    long = {f"void a<{'b' * 80}, {n}>(c)": None for n in range(3)}
    shorts = list(short_names([*long, "void a()"]).values())
    assert len(set(shorts)) == 4
    assert all(len(short) <= 63 for short in shorts)


def gpu_claim(rows, part):
    (found,) = [verdict for verdict in layer_verdicts(rows) if part in verdict.claim]
    return found.holds, found.numbers


def test_claims_on_layers_take_the_faster_way():
    rows = [
        gpu_layer_row("eager", median_ms=9.0),
        gpu_layer_row("batched_mm", median_ms=5.0),
        gpu_layer_row("batched_mm, graph", median_ms=4.0),
        gpu_layer_row("throughput 0.6", median_ms=1.0),
        gpu_layer_row("throughput 0.6, dynamic", median_ms=8.0, share_of_floor=0.2),
        gpu_layer_row("throughput 0.6, dynamic, graph", median_ms=2.0),
        gpu_layer_row("uncompressed", median_ms=4.3),
        gpu_layer_row("performance 0.6", median_ms=None, note="failed: no kernel"),
    ]
    expected = "2.00 (throughput 0.6, dynamic, graph against batched_mm, graph)"
    assert gpu_claim(rows, "throughput 0.6: at least 1.5") == (True, expected)
    assert gpu_claim(rows, "performance 0.6: at least 1.15") == (False, "performance 0.6: failed: no kernel")
    reached = "0 of 1; least 0.93 (uncompressed against batched_mm, graph), 1 token"
    assert gpu_claim(rows, "at most 5% slower") == (False, reached)
    faster = [*rows[:6], gpu_layer_row("uncompressed", median_ms=4.19)]
    assert gpu_claim(faster, "at most 5% slower")[0]
    assert gpu_claim(faster, "floor / 0.75") == (True, "3 of 3; least 0.80 (throughput 0.6)")
    assert gpu_claim(rows, "floor / 0.75") == (False, "3 of 4; least 0.00 (performance 0.6)")
    assert gpu_claim(rows, "every output")[0]
    wrong = [*rows, gpu_layer_row("performance 0.4", median_ms=None, note="wrong: differs")]
    assert gpu_claim(wrong, "every output") == (False, "performance 0.4, 1 token")
    others = [row | {"shape": "other"} for row in rows]
    assert not [verdict for verdict in layer_verdicts(others) if "times as fast" in verdict.claim]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "gpu-x.json must be JSON"),
        ({"kind": "layer"}, "gpu-x.json must be of the kind gpu-check or gpu-bench, got 'layer'."),
        ({"kind": "gpu-bench", "rows": []}, "gpu-x.json must have the entries date, commit, gpu, versions, rows, got none"),
    ],
)
def test_gpu_records_that_are_none(tmp_path, value, message):
    assert read_gpu_records(tmp_path / "none") == read_gpu_records(tmp_path) == []
    save(tmp_path, "gpu-x.json", value)
    with pytest.raises(ValueError, match=message):
        read_gpu_records(tmp_path)
