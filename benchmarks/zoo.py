"""Tiny Hugging Face models of many architectures, built from configurations with random weights: nothing is downloaded.

Every entry builds a module whose `module(*inputs)` is a training loss, the inputs and the dimension of the inputs that holds the
sequence. Dropout is 0 everywhere, models are in training mode and parameters are perturbed, so that none is zero or one.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FAMILIES", "ZOO", "Entry", "Example", "NotApplicableError", "widen_casts"]

FAMILIES = ("decoder", "moe", "state-space", "encoder", "encoder-decoder", "vision", "audio", "vision-language")
BATCH = 2
LENGTH = 25
"""Positions of a sequence: divisible by neither 2 nor 3, and the size of nothing else."""
DECODER_LENGTH = 19
VOCABULARY = 96
NOISE = 0.1


class NotApplicableError(ValueError):
    """The architecture does not have the attention implementation that was asked for."""


@dataclass(frozen=True)
class Example:
    """A module, what it is called with, and where the sequence is in that.

    Attributes:
        module: Gives a training loss, a scalar.
        inputs: Its arguments.
        sequence_dim: The dimension of the inputs that holds the sequence: the strategy's argument of that name.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    sequence_dim: int = 1


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        name: The architecture, as Transformers calls it, and the variant in brackets.
        family: One of `FAMILIES`.
        build: Makes the example for an attention implementation.
        implementations: The attention implementations to try; one named "none" for a model without attention.
        note: What the reader of the table should know.
    """

    name: str
    family: str
    build: Callable[[str], Example]
    implementations: tuple[str, ...] = ("sdpa", "eager")
    note: str = ""


class Loss(nn.Module):
    """A model called by the names of its arguments, for its loss."""

    def __init__(self, model: nn.Module, names: Sequence[str], fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.fixed = model, tuple(names), dict(fixed)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True)), **self.fixed).loss


class Square(nn.Module):
    """The mean square of a model's last hidden states."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *inputs: Tensor) -> Tensor:
        loss = self.loss
        return loss.model(**dict(zip(loss.names, inputs, strict=True)), **loss.fixed).last_hidden_state.square().mean()


ZOO: dict[str, Entry] = {}


def add(
    name: str, family: str, build: Callable[[str], Example], implementations: tuple[str, ...] = ("sdpa", "eager"), note: str = ""
) -> None:
    assert name not in ZOO, name
    assert family in FAMILIES, family
    ZOO[name] = Entry(name, family, build, implementations, note)


def configuration(model_type: str, **settings: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **settings)


def without_randomness(config: Any) -> None:
    """Set every dropout rate of a configuration, and of those inside it, to 0 and switch caches off."""
    from transformers import PreTrainedConfig

    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            without_randomness(value)
        elif "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
        elif key == "use_cache":
            config.use_cache = False


def widen_casts() -> None:
    """Let Transformers, imported after this, compute in float64 where it says float32.

    Norms, softmax and losses of most models cast to float32, which would hide differences below 1e-7. While a file of Transformers
    is imported, `torch.float32` is read as `torch.float64` and `.float()` as `.double()`; nothing else changes.
    """
    sys.meta_path.insert(0, _Widening())
    torch.set_default_dtype(torch.float64)
    from transformers.integrations import moe

    moe._can_use_grouped_mm = lambda *args, **kwargs: (
        False
    )  # PyTorch's kernel has no float64; compiled, the fallback is used anyway


class _Widening(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if not fullname.startswith("transformers."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader) and spec.origin is not None:
            with open(spec.origin, encoding="utf-8") as file:
                source = file.read()
            if _FLOAT32.search(source):
                spec.loader = _WideLoader(fullname, spec.origin)
        return spec


class _WideLoader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        with open(self.path, encoding="utf-8") as file:
            return compile(_FLOAT32.sub(lambda m: _WIDE[m[1] or m[2]], file.read()), self.path, "exec", dont_inherit=True)


_FLOAT32 = re.compile(r"(\btorch\.float)(?:32)?\b|(\.float\(\))")
_WIDE = {"torch.float": "torch.float64", ".float()": ".double()"}


def make(kind: str, config: Any, attention: str, inputs: Mapping[str, Tensor], sequence_dim: int = 1, **fixed: Any) -> Example:
    """Build a model and its example.

    Args:
        kind: The name of the model class in Transformers, an `Auto` class or another.
        config: Its configuration.
        attention: The attention implementation.
        inputs: The arguments that are tensors, by name.
        sequence_dim: The dimension that holds the sequence.
        fixed: Further arguments.
    """
    import transformers

    without_randomness(config)
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    implementation = {} if attention == "none" else {"attn_implementation": attention}
    try:
        if kind.startswith("Auto"):
            model = model_class.from_config(config, **implementation)
        else:
            model = model_class._from_config(config, **implementation)
    except (ValueError, ImportError) as error:
        if attention in str(error) and "support" in str(error) or "scaled_dot_product_attention" in str(error):
            raise NotApplicableError(str(error)) from None
        raise
    if attention != "none":
        used = {getattr(m.config, "_attn_implementation", attention) for m in model.modules() if hasattr(m, "config")}
        if attention not in used:
            raise NotApplicableError(f"{kind} falls back to {sorted(map(str, used))}")
    model.to(torch.get_default_dtype()).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif type(module).__name__ == "PhimoeTopKRouter":
            module.eval()  # it samples experts while it trains
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * NOISE)
    return Example(Loss(model, list(inputs), fixed), tuple(inputs.values()), sequence_dim)


def tokens(length: int = LENGTH, *, low: int = 10, high: int = VOCABULARY, seed: int = 1) -> Tensor:
    """Return random ids, none of them a special one."""
    return torch.randint(low, high, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def targets(ids: Tensor) -> Tensor:
    """Return labels: other ids, with some positions ignored."""
    labels = tokens(ids.shape[1], seed=2)
    labels[0, 3:6] = -100
    return labels


def padding(length: int = LENGTH) -> Tensor:
    """Return a mask that ends the second sequence before the end."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, -6:] = 0
    return mask


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.get_default_dtype())


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **SPECIAL,
}
GROUPED = {**BASE, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ALTERNATING = ["sliding_attention", "full_attention"]


def text(
    name: str,
    family: str,
    model_type: str,
    settings: Mapping[str, Any],
    *,
    kind: str = "AutoModelForCausalLM",
    padded: bool = False,
    implementations: tuple[str, ...] = ("sdpa", "eager"),
    note: str = "",
    change: Callable[[Any], None] | None = None,
    length: int = LENGTH,
    fixed: Mapping[str, Any] | None = None,
) -> None:
    """Add a model from ids and labels to a loss over tokens."""

    def build(attention: str) -> Example:
        ids = tokens(length)
        inputs = {"input_ids": ids, "labels": targets(ids)}
        if padded:
            inputs["attention_mask"] = padding(length)
        config = configuration(model_type, **settings)
        if change is not None:
            change(config)
        return make(kind, config, attention, inputs, **({"use_cache": False} if fixed is None else fixed))

    add(name, family, build, implementations, note)


def experts(implementation: str) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        config._experts_implementation = implementation

    return change


# Decoders

for name, more in {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "ministral": {"sliding_window": 8, "layer_types": ALTERNATING},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": ALTERNATING},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": ALTERNATING},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 8, "layer_types": ALTERNATING},
    "stablelm": {},
    "starcoder2": {"sliding_window": 8},
    "cohere": {},
    "cohere2": {"sliding_window": 8, "layer_types": ALTERNATING},
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "smollm3": {"no_rope_layers": [1, 0]},
    "nemotron": {},
    "exaone4": {"sliding_window": 8, "layer_types": ALTERNATING},
    "ernie4_5": {},
    "helium": {},
    "seed_oss": {},
    "arcee": {},
    "apertus": {},
    "hunyuan_v1_dense": {},
    "bitnet": {},
    "diffllama": {},
    "nanochat": {},
    "vaultgemma": {"sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": ALTERNATING},
    "jais2": {},
    "modernbert-decoder": {
        "local_attention": 8,
        "layer_types": ALTERNATING,
        "norm_bias": True,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
}.items():
    text(name, "decoder", name, {**GROUPED, **more})

text("llama (padding mask)", "decoder", "llama", GROUPED, padded=True)
text("mistral (padding mask)", "decoder", "mistral", {**GROUPED, "sliding_window": 8}, padded=True)
text("phi", "decoder", "phi", {**BASE, "partial_rotary_factor": 0.5})
text("persimmon", "decoder", "persimmon", {**BASE, "partial_rotary_factor": 0.5})
GPT2 = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, **SPECIAL}
text("gpt2", "decoder", "gpt2", GPT2)
text("gpt_bigcode", "decoder", "gpt_bigcode", GPT2)
text("openai-gpt", "decoder", "openai-gpt", GPT2, fixed={})
text("gptj", "decoder", "gptj", {**GPT2, "rotary_dim": 4})
text("codegen", "decoder", "codegen", {**GPT2, "rotary_dim": 4, "n_ctx": 64})
text("gpt_neox", "decoder", "gpt_neox", {**BASE, "rotary_pct": 0.5})
text("gpt_neox_japanese", "decoder", "gpt_neox_japanese", {**BASE, "rotary_pct": 0.5, "intermediate_multiple_size": 2})
text(
    "gpt_neo",
    "decoder",
    "gpt_neo",
    {**BASE, "num_layers": 2, "num_heads": 4, "window_size": 8, "attention_types": [[["global", "local"], 1]]},
)
text(
    "opt",
    "decoder",
    "opt",
    {**BASE, "ffn_dim": 64, "word_embed_proj_dim": 32},
)
text("bloom (ALiBi)", "decoder", "bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **SPECIAL})
text(
    "mpt (ALiBi)",
    "decoder",
    "mpt",
    {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, **SPECIAL},
)
text("falcon", "decoder", "falcon", {**BASE, "new_decoder_architecture": False, "multi_query": True, "alibi": False})
text("falcon (ALiBi)", "decoder", "falcon", {**BASE, "new_decoder_architecture": False, "multi_query": True, "alibi": True})
text("biogpt", "decoder", "biogpt", BASE)
text("xglm", "decoder", "xglm", {**BASE, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4})
text("ctrl", "decoder", "ctrl", {**GPT2, "dff": 64})
text("xlm", "decoder", "xlm", {"vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 2, "n_heads": 4,
    "max_position_embeddings": 64, "causal": True, "pad_index": 0, **SPECIAL}, kind="XLMWithLMHeadModel", fixed={})  # fmt: skip
text("xlnet", "decoder", "xlnet", {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, **SPECIAL},
    fixed={"use_mems": False})  # fmt: skip
text(
    "minicpm3",
    "decoder",
    "minicpm3",
    {
        **BASE,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
)

# Mixtures of experts

text("mixtral", "moe", "mixtral", {**EXPERTS, "num_local_experts": 4})
text("mixtral (router loss)", "moe", "mixtral", {**EXPERTS, "num_local_experts": 4, "output_router_logits": True,
    "router_aux_loss_coef": 0.1})  # fmt: skip
text("mixtral (batched_mm)", "moe", "mixtral", {**EXPERTS, "num_local_experts": 4}, change=experts("batched_mm"))
text("mixtral (eager experts)", "moe", "mixtral", {**EXPERTS, "num_local_experts": 4}, change=experts("eager"))
text("qwen2_moe", "moe", "qwen2_moe", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24})
text("qwen3_moe", "moe", "qwen3_moe", {**EXPERTS, "num_experts": 4, "norm_topk_prob": True})
text("olmoe", "moe", "olmoe", {**EXPERTS, "num_experts": 4})
text("flex_olmo", "moe", "flex_olmo", {**EXPERTS, "num_experts": 4})
text("granitemoe", "moe", "granitemoe", {**EXPERTS, "num_local_experts": 4})
text("granitemoeshared", "moe", "granitemoeshared", {**EXPERTS, "num_local_experts": 4, "shared_intermediate_size": 24})
DEEPSEEK = {
    **BASE,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}
text("deepseek_v2", "moe", "deepseek_v2", {**DEEPSEEK, "topk_method": "greedy"})
text("deepseek_v3", "moe", "deepseek_v3", DEEPSEEK)
text("gpt_oss", "moe", "gpt_oss", {**EXPERTS, "num_local_experts": 4, "sliding_window": 8, "layer_types": ALTERNATING})
text("phimoe", "moe", "phimoe", {**EXPERTS, "num_local_experts": 4}, note="experts chosen as in evaluation, not sampled")
text("glm4_moe", "moe", "glm4_moe", {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1})  # fmt: skip
text("dots1", "moe", "dots1", {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1})  # fmt: skip
text("ernie4_5_moe", "moe", "ernie4_5_moe", {**EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1})
text("hunyuan_v1_moe", "moe", "hunyuan_v1_moe", {**EXPERTS, "num_experts": 4, "moe_topk": 2})
text("llama4_text", "moe", "llama4_text", {**EXPERTS, "intermediate_size_mlp": 64, "num_local_experts": 4,
    "interleave_moe_layer_step": 1, "attention_chunk_size": 8, "no_rope_layers": [1, 0]})  # fmt: skip
text("minimax_m2", "moe", "minimax_m2", {**EXPERTS, "num_local_experts": 4, "rotary_dim": 8})
text("jetmoe", "moe", "jetmoe", {**GROUPED, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
    "num_key_value_heads": 2, "num_attention_heads": 4})  # fmt: skip
text("dbrx", "moe", "dbrx", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}, "ffn_config": {"ffn_hidden_size": 24,
    "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}, **SPECIAL})  # fmt: skip

# State-space models, linear attention, convolutions, and hybrids of these with attention

NONE = ("none",)
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, **SPECIAL}
text("mamba", "state-space", "mamba", MAMBA, implementations=NONE)
text("mamba (sequential scan)", "state-space", "mamba", {**MAMBA, "use_associative_scan": False}, implementations=NONE)
text("falcon_mamba", "state-space", "falcon_mamba", MAMBA, implementations=NONE)
text(
    "mamba2",
    "state-space",
    "mamba2",
    {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    implementations=NONE,
)
text("rwkv", "state-space", "rwkv", {**MAMBA, "attention_hidden_size": 32, "intermediate_size": 64, "context_length": 64},
    implementations=NONE)  # fmt: skip
text("jamba", "state-space", "jamba", {**EXPERTS, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
    "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
    "use_mamba_kernels": False})  # fmt: skip
SSD = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_expand": 2}
text("bamba", "state-space", "bamba", {**GROUPED, **SSD, "attn_layer_indices": [1]})
text("falcon_h1", "state-space", "falcon_h1", {**GROUPED, **SSD, "mamba_d_ssm": 64})
text("granitemoehybrid", "state-space", "granitemoehybrid", {**EXPERTS, **SSD, "num_local_experts": 4,
    "shared_intermediate_size": 24, "layer_types": ["mamba", "attention"]})  # fmt: skip
text("nemotron_h", "state-space", "nemotron_h", {**GROUPED, "hybrid_override_pattern": "M*-", "num_hidden_layers": 3,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8})  # fmt: skip
text("zamba", "state-space", "zamba", {**GROUPED, "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4,
    "mamba_d_state": 8, "mamba_dt_rank": 4, "n_mamba_heads": 2, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid",
    "mamba", "hybrid"], "use_mamba_kernels": False})  # fmt: skip
text("zamba2", "state-space", "zamba2", {**BASE, "num_key_value_heads": 4, "mamba_d_state": 8, "mamba_ngroups": 2,
    "n_mamba_heads": 8, "mamba_headdim": 8, "chunk_size": 8, "num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid"],
    "adapter_rank": 4})  # fmt: skip
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
text("qwen3_next", "state-space", "qwen3_next", {**EXPERTS, **LINEAR, "num_experts": 4, "shared_expert_intermediate_size": 24,
    "layer_types": ["linear_attention", "full_attention"]})  # fmt: skip
text("qwen3_5_text", "state-space", "qwen3_5_text", {**GROUPED, **LINEAR, "layer_types": ["linear_attention", "full_attention"]})
text("recurrent_gemma", "state-space", "recurrent_gemma", {**GROUPED, "lru_width": 32, "attention_window_size": 8,
    "block_types": ["recurrent", "attention"], "num_key_value_heads": 1})  # fmt: skip
text(
    "lfm2", "state-space", "lfm2", {**GROUPED, "block_multiple_of": 8, "conv_L_cache": 3, "layer_types": ["conv", "full_attention"]}
)
text("lfm2_moe", "state-space", "lfm2_moe", {**EXPERTS, "num_experts": 4, "num_dense_layers": 1, "conv_L_cache": 3,
    "layer_types": ["conv", "full_attention"]})  # fmt: skip
text("minimax", "state-space", "minimax", {**EXPERTS, "num_local_experts": 4, "block_size": 8, "layer_types": ["linear_attention",
    "full_attention"]})  # fmt: skip
text("olmo_hybrid", "state-space", "olmo_hybrid", {**GROUPED, **LINEAR, "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"]})  # fmt: skip

# Encoders

MASKED = "AutoModelForMaskedLM"
NOTHING: dict[str, Any] = {}
BERT = {**BASE, "type_vocab_size": 2}
for name in ("bert", "roberta", "camembert", "xlm-roberta", "data2vec-text", "mpnet", "ernie", "roberta-prelayernorm",
    "megatron-bert", "rembert", "convbert", "roformer", "esm", "nomic_bert", "ibert", "yoso", "nystromformer"):  # fmt: skip
    settings = dict(BERT)
    if name == "esm":
        settings |= {"position_embedding_type": "rotary", "mask_token_id": 3, "token_dropout": False}
    if name == "rembert":
        settings |= {"input_embedding_size": 16, "output_embedding_size": 16}
    if name == "convbert":
        settings |= {"embedding_size": 32, "conv_kernel_size": 3, "head_ratio": 2}
    if name == "nystromformer":
        settings |= {"num_landmarks": 5, "segment_means_seq_len": 25}
    if name in ("yoso",):
        continue  # its kernels are compiled on first use, for CUDA
    text(name, "encoder", name, settings, kind=MASKED, fixed=NOTHING)
text("bert (padding mask)", "encoder", "bert", BERT, kind=MASKED, fixed=NOTHING, padded=True)
text("electra", "encoder", "electra", {**BERT, "embedding_size": 16}, kind=MASKED, fixed=NOTHING)
text("albert", "encoder", "albert", {**BERT, "embedding_size": 16}, kind=MASKED, fixed=NOTHING)
text("mobilebert", "encoder", "mobilebert", {**BERT, "embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    kind=MASKED, fixed=NOTHING)  # fmt: skip
text("squeezebert", "encoder", "squeezebert", {**BERT, "embedding_size": 32}, kind=MASKED, fixed=NOTHING)
text("distilbert", "encoder", "distilbert", {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4,
    "max_position_embeddings": 64, **SPECIAL}, kind=MASKED, fixed=NOTHING)  # fmt: skip
text("modernbert", "encoder", "modernbert", {**BASE, "local_attention": 8, "layer_types": ALTERNATING, "cls_token_id": 1,
    "sep_token_id": 2}, kind=MASKED, fixed=NOTHING)  # fmt: skip
text("modernbert (padding mask)", "encoder", "modernbert", {**BASE, "local_attention": 8, "layer_types": ALTERNATING,
    "cls_token_id": 1, "sep_token_id": 2}, kind=MASKED, fixed=NOTHING, padded=True)  # fmt: skip
text("eurobert", "encoder", "eurobert", {**GROUPED}, kind=MASKED, fixed=NOTHING)
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
text("deberta", "encoder", "deberta", DEBERTA, kind=MASKED, fixed=NOTHING)
text("deberta-v2", "encoder", "deberta-v2", {**DEBERTA, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
    "share_att_key": True}, kind=MASKED, fixed=NOTHING)  # fmt: skip
text("longformer", "encoder", "longformer", {**BERT, "attention_window": [4, 4], "sep_token_id": 2,
    "max_position_embeddings": 64}, kind=MASKED, fixed=NOTHING)  # fmt: skip
text("big_bird", "encoder", "big_bird", {**BERT, "attention_type": "original_full"}, kind=MASKED, fixed=NOTHING)
text("fnet", "encoder", "fnet", BERT, kind=MASKED, fixed=NOTHING, implementations=NONE)
text("canine", "encoder", "canine", {**BERT, "num_hash_buckets": 64, "num_hash_functions": 2, "downsampling_rate": 4,
    "local_transformer_stride": 8}, kind="CanineForTokenClassification", fixed=NOTHING, change=lambda config: setattr(config,
    "num_labels", VOCABULARY))  # fmt: skip
text("funnel", "encoder", "funnel", {"vocab_size": VOCABULARY, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64,
    "block_sizes": [1, 1], "num_decoder_layers": 1, **SPECIAL}, kind=MASKED, fixed=NOTHING)  # fmt: skip
text("bert (token classification)", "encoder", "bert", {**BERT, "num_labels": VOCABULARY}, kind="AutoModelForTokenClassification",
    fixed=NOTHING)  # fmt: skip


def classifier(name: str, model_type: str, settings: Mapping[str, Any]) -> None:
    """Add a model from ids to a loss over sequences."""

    def build(attention: str) -> Example:
        config = configuration(model_type, **settings, num_labels=3)
        inputs = {"input_ids": tokens(), "attention_mask": padding(), "labels": torch.tensor([1, 2])}
        return make("AutoModelForSequenceClassification", config, attention, inputs)

    add(name, "encoder", build)


classifier("bert (sequence classification)", "bert", BERT)

# Encoders with decoders


def translator(
    name: str,
    model_type: str,
    settings: Mapping[str, Any],
    *,
    padded: bool = False,
    kind: str = "AutoModelForSeq2SeqLM",
    note: str = "",
) -> None:
    """Add a model from ids to labels of another length."""

    def build(attention: str) -> Example:
        inputs = {"input_ids": tokens(), "labels": targets(tokens(DECODER_LENGTH))}
        if padded:
            inputs["attention_mask"] = padding()
        config = configuration(model_type, **settings, decoder_start_token_id=1)
        return make(kind, config, attention, inputs, use_cache=False)

    add(name, "encoder-decoder", build, note=note)


T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, **SPECIAL}  # fmt: skip
for name in ("t5", "mt5", "umt5", "longt5", "switch_transformers", "pop2piano"):
    settings = dict(T5)
    if name == "longt5":
        settings |= {"local_radius": 7}
    if name == "switch_transformers":
        settings |= {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "router_jitter_noise": 0.0}
    if name == "pop2piano":
        continue
    translator(name, name, settings)
translator("t5 (padding mask)", "t5", T5, padded=True)
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "forced_eos_token_id": 2,
    **SPECIAL,
}
for name in ("bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot", "blenderbot-small", "plbart", "pegasus_x", "led",
    "bigbird_pegasus", "nllb-moe", "prophetnet"):  # fmt: skip
    settings = dict(BART)
    if name == "led":
        settings |= {"attention_window": [4, 4], "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
    if name == "bigbird_pegasus":
        settings |= {"attention_type": "original_full"}
    if name == "pegasus_x":
        settings |= {"block_size": 8, "num_global_tokens": 4}
    if name == "nllb-moe":
        settings |= {"num_experts": 4, "expert_capacity": 64, "encoder_sparse_step": 2, "decoder_sparse_step": 2}
    if name == "prophetnet":
        settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
            "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
            "max_position_embeddings": 64, **SPECIAL}  # fmt: skip
    translator(name, name, settings)
translator("bart (padding mask)", "bart", BART, padded=True)


def t5gemma(attention: str) -> Example:
    part = {**GROUPED, "sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": ALTERNATING}
    config = configuration("t5gemma", encoder=part, decoder=part, vocab_size=VOCABULARY)
    inputs = {"input_ids": tokens(), "labels": targets(tokens(DECODER_LENGTH))}
    return make("T5GemmaForConditionalGeneration", config, attention, inputs, use_cache=False)


add("t5gemma", "encoder-decoder", t5gemma)


# Vision: the sequence is patches, row by row, so the height of the image is what is cut.

IMAGE = {"image_size": 20, "patch_size": 4, "num_channels": 3}
VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **IMAGE}
ROWS = "height of the image is the sequence"


def image(
    name: str,
    model_type: str,
    settings: Mapping[str, Any],
    *,
    kind: str = "AutoModelForImageClassification",
    size: tuple[int, int] = (20, 12),
    note: str = ROWS,
    implementations: tuple[str, ...] = ("sdpa", "eager"),
    **fixed: Any,
) -> None:
    """Add an image classifier."""

    def build(attention: str) -> Example:
        config = configuration(model_type, **settings)
        config.num_labels = 3
        inputs = {"pixel_values": noise(BATCH, 3, *size), "labels": torch.tensor([1, 2])}
        return make(kind, config, attention, inputs, 2, **fixed)

    add(name, "vision", build, implementations, note)


FREE = {"interpolate_pos_encoding": True}
image("vit", "vit", VIT, **FREE)
image("vit (fixed size)", "vit", {**VIT, "image_size": (20, 12)}, note=ROWS + ", which the model checks against its configuration")
image("vit_msn", "vit_msn", VIT, **FREE)
image("ijepa", "ijepa", VIT, **FREE)
image("deit", "deit", VIT, kind="DeiTForImageClassification", **FREE)
image("beit", "beit", {**VIT, "use_absolute_position_embeddings": True})
image("data2vec-vision", "data2vec-vision", {**VIT, "use_relative_position_bias": True})
image("dinov2", "dinov2", {**VIT, "mlp_ratio": 2})
image("dinov2_with_registers", "dinov2_with_registers", {**VIT, "mlp_ratio": 2, "num_register_tokens": 2})
image("siglip", "siglip", {"vision_config": VIT}, kind="SiglipForImageClassification", **FREE)
image("clip", "clip", {"vision_config": VIT}, kind="CLIPForImageClassification", size=(20, 20), note=ROWS + ", fixed by the model")
image("swin", "swin", {**IMAGE, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2}, size=(40, 24), **FREE)
image(
    "swinv2", "swinv2", {**IMAGE, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2}, size=(40, 24), **FREE
)
image("segformer", "segformer", {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
    "num_attention_heads": [2, 4], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16})  # fmt: skip
image("pvt_v2", "pvt_v2", {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
    "num_attention_heads": [2, 4], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]})  # fmt: skip
image("convnext", "convnext", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 4}, implementations=NONE)
image("poolformer", "poolformer", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [3, 3],
    "strides": [2, 2], "padding": [1, 1]}, implementations=NONE)  # fmt: skip
image("hiera", "hiera", {"embed_dim": 16, "image_size": [32, 32], "patch_size": [3, 3], "patch_stride": [4, 4],
    "patch_padding": [1, 1], "masked_unit_size": [2, 2], "depths": [1, 1], "num_heads": [2, 4], "num_query_pool": 1,
    "query_stride": [2, 2]}, size=(32, 16), **FREE)  # fmt: skip


class MaskedByContent(nn.Module):
    """A masked autoencoder that hides the brightest patches, for those that it draws are others every time."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, pixel_values: Tensor) -> Tensor:
        size = self.loss.model.config.patch_size
        self.loss.fixed["noise"] = nn.functional.avg_pool2d(pixel_values.mean(1, keepdim=True), size).flatten(1)
        return self.loss(pixel_values)


def masked_autoencoder(attention: str) -> Example:
    config = configuration("vit_mae", **VIT, decoder_num_attention_heads=4, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_intermediate_size=64, mask_ratio=0.5)  # fmt: skip
    example = make(
        "ViTMAEForPreTraining", config, attention, {"pixel_values": noise(BATCH, 3, 20, 12)}, 2, interpolate_pos_encoding=True
    )
    return replace(example, module=MaskedByContent(example.module))


def dinov3(attention: str) -> Example:
    example = make("DINOv3ViTModel", configuration("dinov3_vit", **VIT, num_register_tokens=2, pos_embed_rescale=None), attention,
        {"pixel_values": noise(BATCH, 3, 20, 12)}, 2)  # fmt: skip
    return Example(Square(example.module), example.inputs, 2)


add("dinov3_vit", "vision", dinov3, note=ROWS + "; the loss is the mean square of the last hidden states")
add("vit_mae", "vision", masked_autoencoder, note=ROWS)


def similarity(name: str, model_type: str, kind: str) -> None:
    """Add a model that compares texts with images; the text is the sequence."""

    def build(attention: str) -> Example:
        config = configuration(model_type, text_config={**BASE, "projection_dim": 16}, vision_config=VIT, projection_dim=16)
        inputs = {"input_ids": tokens(), "pixel_values": noise(BATCH, 3, 20, 20)}
        return make(kind, config, attention, inputs, return_loss=True)

    add(name, "vision-language", build, note="the text is the sequence")


similarity("clip (contrastive)", "clip", "CLIPModel")
similarity("siglip (contrastive)", "siglip", "SiglipModel")

# Audio

SPEECH = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (16, 16),
    "conv_kernel": (5, 3),
    "conv_stride": (4, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
    **SPECIAL,
}
SAMPLES = 403
WAVE = "samples of the wave are the sequence"


def speech(
    name: str,
    model_type: str,
    settings: Mapping[str, Any],
    *,
    frames: tuple[int, ...] = (SAMPLES,),
    argument: str = "input_values",
    note: str = WAVE,
    transcript: bool = False,
) -> None:
    """Add a model from sound to a class, its convolutions over the wave frozen, or, by CTC, to a transcript."""

    def build(attention: str) -> Example:
        config = configuration(model_type, **settings)
        inputs = {argument: noise(BATCH, *frames)}
        if transcript:
            inputs["labels"] = tokens(7, seed=5)
            inputs["attention_mask"] = torch.ones(BATCH, frames[0], dtype=torch.long)
            return make("AutoModelForCTC", config, attention, inputs)
        config.num_labels = 3
        example = make("AutoModelForAudioClassification", config, attention, {**inputs, "labels": torch.tensor([1, 2])})
        freeze = getattr(example.module.model, "freeze_feature_encoder", None)
        if freeze is not None:
            freeze()
        return example

    add(name, "audio", build, note=note)


for name, more in {
    "wav2vec2": {"feat_extract_norm": "layer"},
    "hubert": {},
    "wavlm": {},
    "unispeech": {},
    "unispeech-sat": {},
    "data2vec-audio": {"conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2},
    "sew": {"squeeze_factor": 2},
    "wav2vec2-conformer": {"feat_extract_norm": "layer", "conv_depthwise_kernel_size": 3, "position_embeddings_type": "rotary"},
}.items():
    speech(name, name, {**SPEECH, "classifier_proj_size": 16, **more})
speech("wav2vec2 (CTC)", "wav2vec2", {**SPEECH, "feat_extract_norm": "layer"}, transcript=True)
speech("hubert (CTC)", "hubert", SPEECH, transcript=True)
FRAMES = "frames are the sequence"
speech("wav2vec2-bert", "wav2vec2-bert", {**SPEECH, "feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 3,
    "left_max_position_embeddings": 8, "right_max_position_embeddings": 8, "classifier_proj_size": 16}, frames=(53, 16),
    argument="input_features", note=FRAMES)  # fmt: skip
speech("parakeet_ctc (CTC)", "parakeet_ctc", {"vocab_size": VOCABULARY, "pad_token_id": 0, "encoder_config": {"hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "conv_kernel_size": 3, "num_mel_bins": 16,
    "subsampling_factor": 4, "subsampling_conv_channels": 8}}, frames=(103, 16), argument="input_features", transcript=True,
    note=FRAMES)  # fmt: skip

WHISPER = {**BART, "num_mel_bins": 16, "max_source_positions": 26, "max_target_positions": 64}


def whisper(attention: str) -> Example:
    config = configuration("whisper", **WHISPER, decoder_start_token_id=1)
    inputs = {"input_features": noise(BATCH, 16, 52), "labels": targets(tokens(DECODER_LENGTH))}
    return make("WhisperForConditionalGeneration", config, attention, inputs, use_cache=False)


def whisper_encoder(attention: str) -> Example:
    config = configuration("whisper", **WHISPER, num_labels=3)
    inputs = {"input_features": noise(BATCH, 16, 52), "labels": torch.tensor([1, 2])}
    return make("WhisperForAudioClassification", config, attention, inputs, 2)


def spectrogram(attention: str) -> Example:
    config = configuration("audio-spectrogram-transformer", **VIT, max_length=53, num_mel_bins=16, num_labels=3)
    inputs = {"input_values": noise(BATCH, 53, 16), "labels": torch.tensor([1, 2])}
    return make("ASTForAudioClassification", config, attention, inputs)


def speech_to_text(attention: str) -> Example:
    config = configuration("speech_to_text", **BART, max_source_positions=64, max_target_positions=64, input_feat_per_channel=16,
        conv_channels=16, decoder_start_token_id=1)  # fmt: skip
    inputs = {"input_features": noise(BATCH, 101, 16), "labels": targets(tokens(DECODER_LENGTH))}
    return make("Speech2TextForConditionalGeneration", config, attention, inputs, use_cache=False)


def moonshine(attention: str) -> Example:
    config = configuration("moonshine", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2, encoder_num_attention_heads=4, decoder_num_attention_heads=4, max_position_embeddings=64,
        decoder_start_token_id=1, **SPECIAL)  # fmt: skip
    inputs = {"input_values": noise(BATCH, 8003), "labels": targets(tokens(DECODER_LENGTH))}
    return make("MoonshineForConditionalGeneration", config, attention, inputs, use_cache=False)


add("whisper", "audio", whisper, note="the transcript is the sequence")
add("whisper (encoder)", "audio", whisper_encoder, note="frames are the sequence, fixed by the model")
add("audio-spectrogram-transformer", "audio", spectrogram, note="frames are the sequence")
add("speech_to_text", "audio", speech_to_text, note="frames and transcript are sequences")
add("moonshine", "audio", moonshine, note="samples and transcript are sequences")

# Vision and language: the text, image tokens in it, is the sequence

PICTURE_TOKEN = 5
TEXT = {"model_type": "llama", **GROUPED}


def picture_text(num_tokens: int, length: int = LENGTH, *, begin: int | None = None, end: int | None = None) -> Tensor:
    """Return ids with the tokens that stand for an image from position 2 on."""
    ids = tokens(length)
    ids[:, 2 : 2 + num_tokens] = PICTURE_TOKEN
    if begin is not None and end is not None:
        ids[:, 1], ids[:, 2 + num_tokens] = begin, end
    return ids


def picture_labels(ids: Tensor) -> Tensor:
    return targets(ids).masked_fill(ids == PICTURE_TOKEN, -100)


def vision_language(
    name: str,
    model_type: str,
    settings: Mapping[str, Any],
    num_tokens: int,
    pixels: Callable[[], dict[str, Tensor]],
    *,
    kind: str = "AutoModelForImageTextToText",
    length: int = LENGTH,
    note: str = "",
    begin: int | None = None,
    end: int | None = None,
    types: str = "",
    **fixed: Any,
) -> None:
    """Add a model from text with an image to a loss over tokens.

    Args:
        types: The argument that tells image tokens from others, if the model has one.
    """

    def build(attention: str) -> Example:
        ids = picture_text(num_tokens, length, begin=begin, end=end)
        inputs = {"input_ids": ids, "labels": picture_labels(ids), **pixels()}
        if types:
            inputs[types] = (ids == PICTURE_TOKEN).long()
        config = configuration(model_type, **settings)
        return make(kind, config, attention, inputs, use_cache=False, **fixed)

    add(name, "vision-language", build, note=note)


def pixel_values(*size: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": noise(*size)}


def patches(width: int, grid: tuple[int, int, int]) -> Callable[[], dict[str, Tensor]]:
    """Return what makes the flattened patches of one image a sample and the grid they come from."""
    frames, rows, columns = grid
    return lambda: {"pixel_values": noise(BATCH * frames * rows * columns, width), "image_grid_thw": torch.tensor([grid] * BATCH)}


SMALL = {**VIT, "image_size": 12, "projection_dim": 32}  # nine patches
CLIP = {"model_type": "clip_vision_model", **SMALL}
SIGLIP = {"model_type": "siglip_vision_model", **SMALL}
SPOT = {"image_token_index": PICTURE_TOKEN, "image_token_id": PICTURE_TOKEN}
vision_language("llava", "llava", {"text_config": TEXT, "vision_config": CLIP, "image_seq_length": 9, "vision_feature_layer": -1,
    **SPOT}, 9, pixel_values(BATCH, 3, 12, 12))  # fmt: skip
vision_language("vipllava", "vipllava", {"text_config": TEXT, "vision_config": CLIP, "vision_feature_layers": [-1, -2], **SPOT},
    9, pixel_values(BATCH, 3, 12, 12))  # fmt: skip
vision_language("paligemma", "paligemma", {"text_config": {"model_type": "gemma", **GROUPED}, "vision_config": {**SIGLIP,
    "projection_dim": 32, "vision_use_head": False}, "projection_dim": 32, "hidden_size": 32, **SPOT, **SPECIAL}, 9,
    pixel_values(BATCH, 3, 12, 12), types="token_type_ids")  # fmt: skip
vision_language("gemma3", "gemma3", {"text_config": {"model_type": "gemma3_text", **GROUPED, "sliding_window": 8,
    "query_pre_attn_scalar": 8, "layer_types": ALTERNATING}, "vision_config": {**SIGLIP, "image_size": 16,
    "vision_use_head": False}, "mm_tokens_per_image": 4, "boi_token_index": 6, "eoi_token_index": 7, **SPOT}, 4,
    pixel_values(BATCH, 3, 16, 16), types="token_type_ids")  # fmt: skip
vision_language("mistral3", "mistral3", {"text_config": {"model_type": "mistral", **GROUPED, "sliding_window": None},
    "vision_config": {"model_type": "pixtral", **VIT, "image_size": 24, "head_dim": 8}, "vision_feature_layer": -1,
    "spatial_merge_size": 2, **SPOT}, 9, lambda: {"pixel_values": noise(BATCH, 3, 24, 24), "image_sizes": torch.tensor([[24,
    24]] * BATCH)})  # fmt: skip
IDEFICS = {
    "text_config": TEXT,
    "vision_config": {**VIT, "image_size": 12},
    "scale_factor": 3,
    "image_token_id": PICTURE_TOKEN,
    "pad_token_id": 0,
}
vision_language("idefics3", "idefics3", IDEFICS, 1, pixel_values(BATCH, 1, 3, 12, 12))
vision_language("smolvlm", "smolvlm", IDEFICS, 1, pixel_values(BATCH, 1, 3, 12, 12))
vision_language("internvl", "internvl", {"text_config": {"model_type": "qwen2", **GROUPED}, "vision_config": {**VIT,
    "image_size": [16, 16], "patch_size": [4, 4], "use_absolute_position_embeddings": True}, "downsample_ratio": 0.5,
    "vision_feature_layer": -1, "image_seq_length": 4, **SPOT}, 4, pixel_values(BATCH, 3, 16, 16))  # fmt: skip
vision_language("cohere2_vision", "cohere2_vision", {"text_config": {"model_type": "cohere2", **GROUPED, "sliding_window": 8,
    "layer_types": ALTERNATING}, "vision_config": {**SIGLIP, "image_size": 16, "vision_use_head": False}, "downsample_factor": 2,
    "alignment_intermediate_size": 64, **SPOT}, 4, pixel_values(BATCH, 3, 16, 16))  # fmt: skip
vision_language("aya_vision", "aya_vision", {"text_config": {"model_type": "cohere2", **GROUPED, "sliding_window": 8,
    "layer_types": ALTERNATING}, "vision_config": {**SIGLIP, "image_size": 16, "vision_use_head": False}, "downsample_factor": 2,
    "adapter_layer_norm_eps": 1e-6, "vision_feature_layer": -1, **SPOT}, 4, pixel_values(BATCH, 3, 16, 16))  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN = {"image_token_id": PICTURE_TOKEN, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
QWEN_VISION = {"depth": 2, "num_heads": 4, "in_channels": 3, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
vision_language("qwen2_vl", "qwen2_vl", {"text_config": {**GROUPED, "rope_parameters": ROPE}, "vision_config": {**QWEN_VISION,
    "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}, **QWEN}, 4, patches(96, (1, 4, 4)), begin=7, end=8,
    types="mm_token_type_ids")  # fmt: skip
vision_language("qwen2_5_vl", "qwen2_5_vl", {"text_config": {**GROUPED, "rope_parameters": ROPE}, "vision_config": {**QWEN_VISION,
    "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "window_size": 16, "fullatt_block_indexes": [1]}, **QWEN},
    4, patches(96, (1, 4, 4)), begin=7, end=8, types="mm_token_type_ids")  # fmt: skip
vision_language("qwen3_vl", "qwen3_vl", {"text_config": {**GROUPED, "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}},
    "vision_config": {**QWEN_VISION, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, **QWEN}, 4, patches(96, (1, 4, 4)), begin=7, end=8,
    types="mm_token_type_ids")  # fmt: skip
vision_language("glm4v", "glm4v", {"text_config": {**GROUPED, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}},
    "vision_config": {**QWEN_VISION, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "image_size": 16},
    "image_token_id": PICTURE_TOKEN, "video_token_id": 6, "image_start_token_id": 7, "image_end_token_id": 8}, 4, patches(96, (1,
    4, 4)), begin=7, end=8, types="mm_token_type_ids")  # fmt: skip
BLIP = {
    "vision_config": {**VIT, "image_size": 12},
    "qformer_config": {**BASE, "encoder_hidden_size": 32},
    "num_query_tokens": 9,
    **SPOT,
}
vision_language("blip-2", "blip-2", {**BLIP, "text_config": {"model_type": "opt", **BASE, "ffn_dim": 64,
    "word_embed_proj_dim": 32}}, 9, pixel_values(BATCH, 3, 12, 12), kind="Blip2ForConditionalGeneration")  # fmt: skip
vision_language("git", "git", {**BASE, "vision_config": {**VIT, "image_size": 12}}, 0, pixel_values(BATCH, 3, 12, 12),
    kind="GitForCausalLM", note="image tokens are put before the text")  # fmt: skip
vision_language("llama4", "llama4", {"text_config": {**EXPERTS, "intermediate_size_mlp": 64, "num_local_experts": 4,
    "interleave_moe_layer_step": 1, "attention_chunk_size": 8, "no_rope_layers": [1, 0]}, "vision_config": {**VIT,
    "image_size": 16, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "intermediate_size": 128,
    "pixel_shuffle_ratio": 0.5}, **SPOT}, 4, pixel_values(BATCH, 3, 16, 16), kind="Llama4ForConditionalGeneration")  # fmt: skip
vision_language("mllama", "mllama", {"text_config": {**GROUPED, "cross_attention_layers": [1]}, "vision_config": {**VIT,
    "attention_heads": 4, "num_global_layers": 1, "image_size": 12, "max_num_tiles": 1, "vision_output_dim": 64,
    "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}, "image_token_index": PICTURE_TOKEN}, 1,
    lambda: {"pixel_values": noise(BATCH, 1, 1, 3, 12, 12), "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
    "aspect_ratio_mask": torch.ones(BATCH, 1, 1, dtype=torch.long), "cross_attention_mask": torch.ones(BATCH, LENGTH, 1, 1,
    dtype=torch.long)}, kind="MllamaForConditionalGeneration")  # fmt: skip
