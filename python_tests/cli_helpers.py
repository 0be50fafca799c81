"""What the command line is tried on, a tiny random Mixtral with a tokenizer, and how it is run."""

import json
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from d2moe_ext.cli import main

VOCABULARY = 300
EXPERTS = 8

# Options of `d2moe compress` for a calibration of a second.
QUICK = ("--samples", "6", "--seqlen", "32", "--batch-size", "3")

# Long enough for windows of 32 tokens, and different in every line.
TEXT = "\n".join(f"line {number}: the {number * 7 % 13}th word of {number * number} words" for number in range(200))


def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def config(**options) -> MixtralConfig:
    """Nine tenths of the parameters stand in experts, so that ratios up to 0.6 can be reached."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return MixtralConfig(**(sizes | options))


def save_model(directory: Path, **options) -> Path:
    torch.manual_seed(0)
    MixtralForCausalLM(config(**options)).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def run(capsys, *arguments):
    """The exit code, what was printed, and what went to the error stream."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def run_json(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def assert_refused(result, *parts):
    """Exit code 2 and one sentence on one line."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("d2moe: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    assert not re.search(r"[.!?]\s+[A-Z]", err)
    for part in parts:
        assert part in err
