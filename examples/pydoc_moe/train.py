"""Train the shipped model from scratch, on CPU, on text that every Python has.

Two phases, so that the experts share something and differ in something, as they do in real models:

1. a dense model (one expert, always chosen) learns the text;
2. its feed-forward network is copied into eight experts, 30 % of each copy's neurons are drawn anew,
   and training goes on with top-2 routing and a load-balancing loss.

Usage: ``python examples/pydoc_moe/train.py OUT`` (about an hour on 2 cores).
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast, set_seed

from d2moe_ext.text import python_documents

VOCABULARY = 2048
WINDOW = 256
BATCH = 16
NUM_EXPERTS = 8
REDRAWN_SHARE = 0.3
DENSE_STEPS = 1200
EXPERT_STEPS = 2400
DENSE_RATE = 3e-3
EXPERT_RATE = 2e-3
BALANCE = 0.05


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``VOCABULARY`` pieces, ``<s>`` and ``</s>`` among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Every document's tokens in one row, each document behind a ``<s>``."""
    ids: list[int] = []
    for document in documents:
        ids.append(tokenizer.bos_token_id)
        ids.extend(tokenizer.encode(document, add_special_tokens=False))
    return torch.tensor(ids)


def build(num_experts: int, experts_per_token: int) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        num_local_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        router_aux_loss_coef=BALANCE,
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    return MixtralForCausalLM(config)


def upcycle(dense: MixtralForCausalLM) -> MixtralForCausalLM:
    """Copy the dense feed-forward into every expert and draw ``REDRAWN_SHARE`` of each copy's neurons anew."""
    model = build(NUM_EXPERTS, 2)
    theirs = dense.state_dict()
    mine = model.state_dict()
    for name, value in mine.items():
        if ".experts." in name:
            value.copy_(theirs[name].expand_as(value))
        elif name in theirs and theirs[name].shape == value.shape:
            value.copy_(theirs[name])
    for layer in model.model.layers:
        gate_up, down = layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
        inter = down.shape[2]
        for expert in range(NUM_EXPERTS):
            neurons = torch.randperm(inter)[: int(REDRAWN_SHARE * inter)]
            for weight, index in ((gate_up.data[expert], neurons), (gate_up.data[expert], neurons + inter)):
                weight[index] = torch.randn_like(weight[index]) * weight.std()
            down.data[expert][:, neurons] = torch.randn(down.shape[1], len(neurons)) * down.data[expert].std()
    return model


def train(model: MixtralForCausalLM, stream: torch.Tensor, steps: int, peak_rate: float, warmup: int = 100) -> None:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.95), fused=True)
    routed = model.config.num_local_experts > 1
    model.train()
    started, running = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        progress = step / steps
        rate = peak_rate * min(step / warmup, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        offsets = torch.randint(len(stream) - WINDOW, (BATCH,))
        ids = torch.stack([stream[o : o + WINDOW] for o in offsets])
        output = model(input_ids=ids, labels=ids, output_router_logits=routed)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += output.loss.item()
        if step % 100 == 0:
            each = (time.monotonic() - started) / step
            print(f"step {step}/{steps}  loss {running / 100:.4f}  {each:.2f} s a step", flush=True)
            running = 0.0


@torch.no_grad()
def mean_loss(model: MixtralForCausalLM, stream: torch.Tensor, windows: int = 200) -> float:
    """Mean next-token loss over the first ``windows`` windows, without the load-balancing term."""
    model.eval()
    losses = []
    for index in range(min(windows, len(stream) // WINDOW)):
        ids = stream[None, index * WINDOW : (index + 1) * WINDOW]
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dense-steps", type=int, default=DENSE_STEPS)
    parser.add_argument("--expert-steps", type=int, default=EXPERT_STEPS)
    arguments = parser.parse_args()
    set_seed(arguments.seed)

    documents = python_documents("training")
    tokenizer = train_tokenizer(documents)
    stream = token_stream(tokenizer, documents)
    heldout = token_stream(tokenizer, python_documents("heldout"))
    print(f"{len(documents)} documents, {len(stream):,} tokens", flush=True)

    dense = build(1, 1)
    train(dense, stream, arguments.dense_steps, DENSE_RATE)
    print(f"dense: held-out perplexity {math.exp(mean_loss(dense, heldout)):.2f}", flush=True)
    model = upcycle(dense)
    print(f"after copying: held-out perplexity {math.exp(mean_loss(model, heldout)):.2f}", flush=True)
    train(model, stream, arguments.expert_steps, EXPERT_RATE)
    print(f"experts: held-out perplexity {math.exp(mean_loss(model, heldout)):.2f}", flush=True)

    model.config.router_aux_loss_coef = 0.001
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
