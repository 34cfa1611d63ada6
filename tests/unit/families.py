"""Tiny random models of many families, and one family that exists nowhere else.

Weights are drawn wide enough that routing is uneven and every bias and norm matters: a lost one changes results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV2Config,
    GptOssConfig,
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.modeling_outputs import CausalLMOutput

VOCABULARY = 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "olmoe": lambda: OlmoeConfig(**COMMON, num_hidden_layers=3, intermediate_size=32, num_experts=6),
    "mixtral": lambda: MixtralConfig(**COMMON, num_hidden_layers=2, intermediate_size=48, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **COMMON,
        num_hidden_layers=3,
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=80,
        num_experts=6,
        mlp_only_layers=[1],
        tie_word_embeddings=True,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **COMMON, num_hidden_layers=2, intermediate_size=96, moe_intermediate_size=32, num_experts=6, head_dim=16
    ),
    "deepseek_v2": lambda: DeepseekV2Config(
        **COMMON | {"num_key_value_heads": 4},
        num_hidden_layers=3,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=6,
        n_shared_experts=2,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        routed_scaling_factor=1.5,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **COMMON,
        num_hidden_layers=2,
        intermediate_size=32,
        num_local_experts=6,
        head_dim=16,
        sliding_window=5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "nemotron_h": lambda: NemotronHConfig(
        **COMMON,
        layers_block_type=["full_attention", "moe", "full_attention", "moe"],
        intermediate_size=96,
        n_routed_experts=6,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=48,
        head_dim=16,
    ),
}
FIVE = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2")
"""The families that gemq promises to handle."""
MORE = (*FIVE, "gpt_oss", "nemotron_h")
"""Also transposed, biased and interleaved experts with attention sinks, and experts without a gate."""


def tiny(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny random model of a family, biases and norms drawn at random too."""
    config = CONFIGS[family]() if family in CONFIGS else OwnConfig()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
        elif "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def tokens(windows: int = 3, length: int = 12, seed: int = 1) -> torch.Tensor:
    """Random token ids [windows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (windows, length), generator=generator)


# A family of the tests' own: unknown model_type, own router (with a bias) and own experts class. It has the interface
# that Transformers gives to its families and none of their names.


class OwnConfig(PreTrainedConfig):
    model_type = "gemq_test_moe"

    def __init__(self, hidden_size: int = 64, inner: int = 32, experts: int = 5, layers: int = 3, **kwargs: Any):
        self.hidden_size, self.inner, self.experts, self.layers = hidden_size, inner, experts, layers
        self.vocab_size = kwargs.pop("vocab_size", VOCABULARY)
        self.max_position_embeddings = 64
        super().__init__(**kwargs)


@use_experts_implementation
class OwnFeedForwards(nn.Module):
    def __init__(self, config: OwnConfig):
        super().__init__()
        self.num_experts = config.experts
        self.gate_up_proj = nn.Parameter(torch.empty(config.experts, 2 * config.inner, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.experts, config.hidden_size, config.inner))
        self.act_fn = ACT2FN["gelu"]

    def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        """Every expert on every token, plainly: shares no line with what it is compared with."""
        out = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            weight = (top_k_weights * (top_k_index == e)).sum(-1, keepdim=True)
            gate, up = (hidden_states @ self.gate_up_proj[e].T).chunk(2, -1)
            out = out + weight * ((self.act_fn(gate) * up) @ self.down_proj[e].T)
        return out


class OwnChooser(nn.Module):
    def __init__(self, config: OwnConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.experts, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.experts))

    def forward(self, x: Any) -> Any:
        probabilities = (x @ self.weight.T + self.bias).sigmoid()
        values, indices = probabilities.topk(2, -1)
        return indices, values / values.sum(-1, keepdim=True)  # another order than Transformers' routers


class OwnBlock(nn.Module):
    def __init__(self, config: OwnConfig):
        super().__init__()
        self.chooser = OwnChooser(config)
        self.pool = OwnFeedForwards(config)

    def forward(self, x: Any) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        return self.pool(flat, *self.chooser(flat)).view_as(x)


class OwnLayer(nn.Module):
    def __init__(self, config: OwnConfig, number: int):
        super().__init__()
        self.number = number
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mix_attention = nn.Linear(config.hidden_size, config.hidden_size)
        self.block = OwnBlock(config)

    def forward(self, hidden: Any, decay: Any, *, scale: float) -> Any:
        hidden = hidden + self.mix_attention(decay @ hidden) * scale  # a fixed causal mixture of earlier tokens
        return hidden + self.block(self.norm(hidden))


class OwnModel(PreTrainedModel):
    config: OwnConfig  # type: ignore[assignment]
    config_class = OwnConfig
    base_model_prefix = "trunk"
    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, config: OwnConfig):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = nn.ModuleList(OwnLayer(config, i) for i in range(config.layers))
        self.final = nn.LayerNorm(config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Any = None, use_cache: Any = None, **kwargs: Any) -> CausalLMOutput:
        hidden = self.words(input_ids)
        n = hidden.shape[1]
        decay = torch.ones(n, n, device=hidden.device).tril()
        decay = decay / decay.sum(-1, keepdim=True)
        for number, layer in enumerate(self.stack):
            hidden = layer(hidden, decay, scale=1 / (1 + number))
        return CausalLMOutput(logits=self.out(self.final(hidden)) * 0.5)


AutoConfig.register(OwnConfig.model_type, OwnConfig)
AutoModelForCausalLM.register(OwnConfig, OwnModel)
