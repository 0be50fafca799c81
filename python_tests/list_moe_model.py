"""A causal language model whose MoE layers hold a list of expert MLPs: the shape of code that comes with a checkpoint.

Blocks of this kind (DeepSeek-MoE-16B's is one) loop over the list in training and call ``moe_infer`` with flat pairs
in evaluation. One file, so that ``save_pretrained`` can put it beside the weights.
"""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class ListMoeConfig(PreTrainedConfig):
    model_type = "list_moe"

    def __init__(
        self,
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=6,
        num_experts_per_tok=2,
        expert_bias=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.expert_bias = expert_bias
        super().__init__(**kwargs)


class ListMoeMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, inter, bias = config.hidden_size, config.moe_intermediate_size, config.expert_bias
        self.gate_proj = nn.Linear(hidden, inter, bias=bias)
        self.up_proj = nn.Linear(hidden, inter, bias=bias)
        self.down_proj = nn.Linear(inter, hidden, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ListMoeBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(ListMoeMLP(config) for _ in range(config.num_experts))

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, ids = self.gate(x).softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.training:
            flat = x.repeat_interleave(self.top_k, dim=0)
            y = torch.zeros_like(flat)
            for index, expert in enumerate(self.experts):
                y[ids.view(-1) == index] = expert(flat[ids.view(-1) == index])
            y = (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)
        else:
            y = self.moe_infer(x, ids.view(-1), weights.view(-1, 1))
        return y.view_as(hidden_states)

    @torch.no_grad()
    def moe_infer(self, x, flat_ids, flat_weights):
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            pairs = (flat_ids == index).nonzero().flatten()
            y.index_add_(0, pairs // self.top_k, expert(x[pairs // self.top_k]) * flat_weights[pairs])
        return y


class ListMoeLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.mlp = ListMoeBlock(config)

    def forward(self, x):
        batch, length, width = x.shape
        split = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.mlp_norm(x))


class ListMoeForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = ListMoeConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ListMoeLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    def forward(self, input_ids, **kwargs):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.lm_head(self.norm(x)))
