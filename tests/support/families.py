"""Tiny random models of every family that Transformers has, and one family that exists nowhere else.

A family's default configuration is made small by the names of its fields; what that does not settle stands in one
table. Weights are drawn wide enough that routing is uneven and every bias and norm matters: a lost one changes results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.modeling_outputs import CausalLMOutput

VOCABULARY = 320
"""Every byte, a few special tokens, and from ``SPECIAL`` on those that stand for images and sounds."""
SPECIAL = 280

_SIZES = {
    1: "n_group num_expert_group topk_group first_k_dense_replace num_dense_layers",
    2: """num_hidden_layers num_layers n_layers depth encoder_layers num_key_value_heads kv_n_heads linear_num_key_heads
        swa_num_key_value_heads index_n_heads index_topk_blocks index_kpool o_groups hc_mult hc_count n_groups
        num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts zero_expert_num""",
    4: """num_attention_heads n_heads num_heads swa_num_attention_heads num_sliding_attention_heads window_size
        encoder_attention_heads linear_num_heads linear_num_value_heads
        num_experts num_local_experts n_routed_experts moe_num_experts""",
    8: """qk_rope_head_dim index_topk index_block_size d_rel block_size sliding_window sliding_window_size
        attention_chunk_size mamba_n_heads mamba_num_heads mamba_dt_rank""",
    16: """head_dim kv_channels swa_head_dim v_head_dim qk_nope_head_dim index_head_dim hc_lowrank gated_norm_rank
        rel_extent linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim mamba_d_state
        ssm_state_size chunk_size mamba_chunk_size""",
    32: """shared_expert_intermediate_size shared_experts_intermediate_size
        shared_intermediate_size share_expert_dim moe_shared_expert_intermediate_size merged_hidden_size
        projection_intermediate_size q_lora_rank kv_lora_rank o_lora_rank router_hidden_size""",
    48: "moe_intermediate_size expert_ffn_hidden_size",
    64: """hidden_size d_model moe_hidden_size out_hidden_size text_hidden_size adapter_in_dim adapter_input_size
        adapter_out_dim projector_hidden_size num_position_embeddings vision_output_dim""",
    96: """intermediate_size dense_intermediate_size ffn_hidden_size intermediate_size_mlp mlp_dim encoder_ffn_dim
        prefix_dense_intermediate_size projection_hidden_dim""",
    256: "max_position_embeddings model_max_length max_seq_len",
}
SIZES: dict[str, Any] = {
    **{name: size for size, names in _SIZES.items() for name in names.split()},
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY - 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.2,
}
"""Small values of the fields by which configurations name sizes. What a family does not have is passed over."""

NEVER_NONE = {"n_routed_experts", "num_experts", "moe_intermediate_size", "num_experts_per_tok", "top_k_experts"}
"""Fields that some families leave unset by default: the model would then be a dense one."""

_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_SLIDING_HEADS = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "head_dim": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_DOTS3 = {"per_layer_config": {i: _SLIDING_HEADS for i in range(3)}}
_QWEN4_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
CHANGES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_hidden_layers": 3, "intermediate_size": 48, "num_experts": 6},
    "mixtral": {"intermediate_size": 48},
    "qwen2_moe": {
        "num_hidden_layers": 3,
        "layer_types": None,
        "shared_expert_intermediate_size": 80,
        "num_experts": 6,
        "mlp_only_layers": [1],
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {"num_experts": 6},
    "deepseek_v2": {
        "num_hidden_layers": 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "routed_scaling_factor": 1.5,
    },
    "gpt_oss": {"intermediate_size": 48, "num_local_experts": 6, "sliding_window": 5, "rope_parameters": _ROTARY},
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["full_attention", "moe", "full_attention", "moe"],
        "n_routed_experts": 6,
        "n_groups": 2,
        "n_group": 1,
        "moe_shared_expert_intermediate_size": 48,
    },
    "dots1": {"n_shared_experts": 1},
    "hunyuan_v1_moe": {"head_dim": 16},
    "flint": {"mlp_only_layers": [0]},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "doge": {"is_moe": True},
    "gemma4_text": {"enable_moe_block": True, "hidden_size_per_layer_input": 0},
    "gemma4": {"text_config": {"enable_moe_block": True, "hidden_size_per_layer_input": 0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "ernie4_5_vl_moe": {
        "text_config": {"rope_parameters": {**_ROTARY, "mrope_section": [3, 3, 2]}, "moe_intermediate_size": [48, 16]}
    },
    "glm4v_moe": {
        "text_config": {"rope_parameters": {**_ROTARY, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}}
    },
    "hy_v4_vl": {"text_config": {"rope_parameters": {**_ROTARY, "mrope_section": [2, 1, 1]}}},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "head_dim": 0}},
    "muse_spark": {
        "audio_config": {"num_hidden_layers": 2, "patch_sizes": [16, 6], "hidden_sizes": [16, 32], "depths": [1, 1]}
    },
    "qwen4_exp": {"text_config": _QWEN4_INDEXER},
    "qwen4_exp_text": _QWEN4_INDEXER,
    "qwen3_omni_moe_thinker": {"vision_start_token_id": SPECIAL + 30},
    "qwen3_omni_moe": {
        "talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 32}}
    },
    "diffusion_gemma": {"vision_config": {"model_type": "gemma4_vision", "num_hidden_layers": 2}},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "step3p7": {"text_config": {"sliding_window": 8}},
}
"""What a family needs beside ``SIZES``, by model type. A key that names a part of a configuration changes it there."""


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A tiny configuration of a family: its default one with small sizes, and a layer of every kind that it has."""
    if model_type == TOY:
        return ToyConfig(**changes)
    return _shrunk(CONFIG_MAPPING[model_type](), {**CHANGES.get(model_type, {}), **changes})


def _shrunk(default: Any, changes: dict[str, Any]) -> Any:
    values: dict[str, Any] = {}
    fields = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    for name, value in fields.items():
        if name in SIZES and not isinstance(value, list | tuple | str) and (value is not None or name in NEVER_NONE):
            values[name] = SIZES[name]
    special = [
        n for n in fields if n.endswith(("_token_id", "_token_index")) and type(fields[n]) is int and n not in SIZES
    ]
    values.update({name: SPECIAL + i for i, name in enumerate(special)})
    if "kv_lora_rank" in values:  # keys and values of every head come from one latent vector
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    rope_dim, nope_dim = fields.get("qk_rope_head_dim"), fields.get("qk_nope_head_dim")
    if rope_dim is not None and "head_dim" in values:  # families mean several things by it
        if fields["head_dim"] == rope_dim:
            values["head_dim"] = SIZES["qk_rope_head_dim"]
        elif fields["head_dim"] == rope_dim + (nope_dim or 0):
            values["head_dim"] = SIZES["qk_rope_head_dim"] + SIZES["qk_nope_head_dim"]
    values.update(_layers(fields))
    sub_configs = set(getattr(type(default), "sub_configs", None) or ())
    for name in sorted(sub_configs):
        sub_config, change = fields.get(name), changes.get(name)
        if isinstance(sub_config, PreTrainedConfig):
            values[name] = _shrunk(sub_config, change or {}).to_dict()
            for private in ("_name_or_path", "output_attentions"):  # not every part takes back what it writes
                values[name].pop(private, None)
        elif change is not None:  # a part that is absent by default
            values[name] = change
    attribute_names = type(default).attribute_map
    values.update({attribute_names.get(n, n): value for n, value in changes.items() if n not in sub_configs})
    return type(default)(**values)


def _layers(fields: dict[str, Any]) -> dict[str, Any]:
    """The first layer of every kind, by all the lists that say something of each layer."""
    count = fields.get("num_hidden_layers")
    lists = {n: v for n, v in fields.items() if isinstance(v, list | tuple) and count and len(v) == count}
    kinds = list(zip(*(v for v in lists.values() if all(isinstance(x, str) for x in v)), strict=True))
    if not kinds:
        return {}
    chosen = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())[:5]
    if len(chosen) == 1:
        chosen.append(chosen[0] + 1)
    return {"num_hidden_layers": len(chosen), **{name: [v[i] for i in chosen] for name, v in lists.items()}}


MAIN_FAMILIES = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2")
"""The families that gemq promises to handle."""
TOY = "gemq_test_moe"
"""A family that exists nowhere else: see below."""
FAMILIES = (*MAIN_FAMILIES, "gpt_oss", "nemotron_h")
"""Also transposed, biased and interleaved experts with attention sinks, and experts without a gate."""
KINDS = {
    "gpt_oss": "transposed, biased, interleaved experts",
    "llama4_text": "experts that are given every token's row, no interface of Transformers",
    "longcat_flash": "experts that return their input, two attentions a layer",
    "glm_moe_dsa": "layers that hand chosen positions on to the next",
    "inkling_text": "shared experts stacked in one weight",
    "granitemoehybrid": "state-space layers",
    "qwen3_vl_moe": "a language model that sees: eyes are kept",
}
"""Model types that work, one for everything that sets families apart."""
REFUSED_KINDS = {
    "jetmoe": r"layers\.0\.mlp\.input_linear \(JetMoeParallelExperts\)",
    "switch_transformers": "no encoder-decoders",
    "diffusion_gemma": "is an encoder-decoder model",
}
"""Model types that are refused, and what the refusal says."""


def tiny(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny random model of a family."""
    return random_model(tiny_config(family), seed, dtype)


def random_model(config: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of a configuration, biases and norms drawn at random too. It sees if the family does."""
    autos = (AutoModelForMultimodalLM, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForTokenClassification)
    auto = next(a for a in autos if type(config) in a._model_mapping)
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=dtype, experts_implementation="eager")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
        elif "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def tokens(windows: int = 3, length: int = 12, seed: int = 1) -> torch.Tensor:
    """Random token ids [windows, length], none of a special kind."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 256, (windows, length), generator=generator)


# A family of the tests' own: unknown model_type, own router (with a bias) and own experts class. It has the interface
# that Transformers gives to its families and none of their names.


class ToyConfig(PreTrainedConfig):
    model_type = TOY

    def __init__(self, hidden_size: int = 64, inner: int = 32, experts: int = 5, layers: int = 3, **kwargs: Any):
        self.hidden_size, self.inner, self.experts, self.layers = hidden_size, inner, experts, layers
        self.vocab_size = kwargs.pop("vocab_size", VOCABULARY)
        self.max_position_embeddings = 64
        super().__init__(**kwargs)


@use_experts_implementation
class ToyFeedForwards(nn.Module):
    def __init__(self, config: ToyConfig):
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


class ToyChooser(nn.Module):
    def __init__(self, config: ToyConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.experts, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.experts))

    def forward(self, x: Any) -> Any:
        probabilities = (x @ self.weight.T + self.bias).sigmoid()
        values, indices = probabilities.topk(2, -1)
        return indices, values / values.sum(-1, keepdim=True)  # another order than Transformers' routers


class ToyBlock(nn.Module):
    def __init__(self, config: ToyConfig):
        super().__init__()
        self.chooser = ToyChooser(config)
        self.pool = ToyFeedForwards(config)

    def forward(self, x: Any) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        return self.pool(flat, *self.chooser(flat)).view_as(x)


class ToyLayer(nn.Module):
    def __init__(self, config: ToyConfig, number: int):
        super().__init__()
        self.number = number
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mix_attention = nn.Linear(config.hidden_size, config.hidden_size)
        self.block = ToyBlock(config)

    def forward(self, hidden: Any, decay: Any, *, scale: float) -> Any:
        hidden = hidden + self.mix_attention(decay @ hidden) * scale  # a fixed causal mixture of earlier tokens
        return hidden + self.block(self.norm(hidden))


class ToyModel(PreTrainedModel):
    config: ToyConfig  # type: ignore[assignment]
    config_class = ToyConfig
    base_model_prefix = "trunk"
    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = nn.ModuleList(ToyLayer(config, i) for i in range(config.layers))
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


AutoConfig.register(ToyConfig.model_type, ToyConfig)
AutoModelForCausalLM.register(ToyConfig, ToyModel)
