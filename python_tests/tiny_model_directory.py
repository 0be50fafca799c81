"""A tiny random Mixtral with a tokenizer, saved to a directory: what the command line is tried on."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 300
EXPERTS = 8

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
