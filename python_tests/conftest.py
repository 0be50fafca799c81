from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import cli_helpers
import pytest
import torch
from gpu import EMULATED

from benchmarks.layer import shapes
from d2moe_ext import _native
from d2moe_ext.cli import main


def pytest_configure() -> None:
    """``D2MOE_EMULATED_CUDA=folder`` runs CUDA kernels on the CPU, in place of its own; built in that folder."""
    if EMULATED:
        from tools import emulated  # which needs the folder of the project on the path

        emulated.load(Path(os.environ["D2MOE_EMULATED_CUDA"]).resolve())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none, unless ``D2MOE_REQUIRE_GPU=1`` says that there must be one."""
    if os.environ.get("D2MOE_REQUIRE_GPU") == "1" or (torch.cuda.is_available() and _native.C.build_info()["cuda"]):
        return
    marker = "real_gpu" if EMULATED else "cuda"
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA build and a GPU"))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every tensor that torch leaves uninitialised holds NaN (or the largest integer) while the test runs."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(was_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = was_filling


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Mixtral with its tokenizer; no test may write there."""
    return cli_helpers.save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What its tokenizer was trained on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(cli_helpers.TEXT)
    return path


@pytest.fixture(scope="session")
def compressed_directory(tiny_directory: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the paper's pipeline makes of it at ratio 0.4, with dynamic pruning; no test may write there."""
    out = tmp_path_factory.mktemp("compressed") / "out"
    arguments = [
        "compress",
        str(tiny_directory),
        str(out),
        "--ratio",
        "0.4",
        "--preset",
        "performance",
        "--calibration",
        str(tiny_text),
    ]
    assert main([*arguments, *cli_helpers.QUICK]) == 0
    return out


@pytest.fixture
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The benchmark's first model at sizes that take no time."""
    family, settings = shapes._MODELS["Mixtral-8x7B"]
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(shapes, "_MODELS", {"Mixtral-8x7B": (family, settings | small)})
    cached = (shapes._model, shapes.shapes_of, shapes.layer_plan)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()
