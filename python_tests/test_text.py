"""The text every Python has: three parts that share no document."""

import os
import subprocess
import sys

import pytest

from d2moe_ext.text import python_documents, python_text, split_of

SPLITS = ("training", "calibration", "heldout")


@pytest.fixture(scope="module")
def documents():
    return {split: python_documents(split) for split in SPLITS}


def test_every_split_has_text_and_shares_none(documents):
    for split in SPLITS:
        assert sum(map(len, documents[split])) > 100_000
        assert all(text.strip() for text in documents[split])
    # Equal documents (empty-ish stubs, repeated licences) may occur under two names; long ones must not.
    long = [{text for text in documents[split] if len(text) > 2000} for split in SPLITS]
    assert not long[0] & long[1]
    assert not long[0] & long[2]
    assert not long[1] & long[2]


def test_training_is_about_nine_tenths_of_the_documents(documents):
    counts = {split: len(documents[split]) for split in SPLITS}
    total = sum(counts.values())
    assert 0.85 < counts["training"] / total < 0.95
    assert 0.02 < counts["heldout"] / total < 0.08


def test_a_document_stays_in_its_split():
    """Fixed, because the shipped model was trained on one of the three."""
    assert [split_of(f"source:{name}.py") for name in ("glob", "os", "abc")] == ["heldout", "calibration", "training"]


def test_the_text_is_the_documents_in_order(documents):
    assert python_text("heldout") == "\n\n".join(documents["heldout"])


def test_another_process_reads_the_same_text():
    code = "import hashlib; from d2moe_ext.text import python_text; "
    code += "print(hashlib.sha256(python_text('calibration').encode()).hexdigest())"
    hashes = {
        subprocess.run([sys.executable, "-c", code], env=_environment(seed), capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    }
    assert len(hashes) == 1


def _environment(hash_seed):
    return os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
