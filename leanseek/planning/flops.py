"""What a network costs: parameters in all and per token, cache, FLOPs and memory of training."""

from __future__ import annotations

from leanseek.config import ModelConfig


def _attention(c: ModelConfig) -> int:
    """Matrix elements of one attention layer (all of them multiply every token)."""
    d, heads = c.hidden_size, c.num_attention_heads
    if c.attention == "gqa":
        return d * c.gqa_head_dim * (2 * heads + 2 * c.kv_heads)
    q = d * heads * c.qk_head_dim if c.q_lora_rank is None else c.q_lora_rank * (d + heads * c.qk_head_dim)
    kv = d * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    return q + kv + heads * c.v_head_dim * d


def _feed_forward(c: ModelConfig, layer: int, experts: int) -> int:
    """Matrix elements of one feed-forward with `experts` of its routed experts counted."""
    if not c.is_moe_layer(layer):
        return 3 * c.hidden_size * c.intermediate_size
    return (experts + c.n_shared_experts) * expert(c) + c.n_routed_experts * c.hidden_size


def _norms(c: ModelConfig) -> int:
    """Elements of one block's norms."""
    latents = (c.kv_lora_rank + (c.q_lora_rank or 0)) if c.attention == "mla" else 0
    return 2 * c.hidden_size + latents


def expert(c: ModelConfig) -> int:
    """Parameters of one routed expert."""
    return 3 * c.hidden_size * c.moe_intermediate_size


def linears(c: ModelConfig, layer: int) -> int:
    """Parameters of a block's linears: attention, and the dense feed-forward or the shared experts."""
    dense = c.n_shared_experts * expert(c) if c.is_moe_layer(layer) else 3 * c.hidden_size * c.intermediate_size
    return _attention(c) + dense


def wide(c: ModelConfig, layer: int) -> int:
    """Parameters of a block that are never multiplied in FP8: its gate and norms."""
    return _norms(c) + (c.n_routed_experts * c.hidden_size if c.is_moe_layer(layer) else 0)


def mtp_extra(c: ModelConfig) -> int:
    """Parameters of an MTP module besides its block: eh_proj and three norms."""
    return 2 * c.hidden_size**2 + 3 * c.hidden_size


def _matrices(c: ModelConfig, layer: int) -> int:
    """Matrix elements of a block that multiply a token."""
    return _attention(c) + _feed_forward(c, layer, c.num_experts_per_tok)


def _matrices_after_layers(c: ModelConfig) -> int:
    """Matrix elements that multiply a token after the main model's layers: head and MTP modules."""
    mtp = range(c.num_hidden_layers, c.num_hidden_layers + c.num_nextn_predict_layers)
    return sum(_matrices(c, i) + 2 * c.hidden_size**2 for i in mtp) + _head(c) * (1 + len(mtp))


def _head(c: ModelConfig) -> int:
    return (c.num_labels or c.vocab_size) * c.hidden_size


def _blocks(c: ModelConfig, layers: range, experts: int) -> int:
    return sum(_attention(c) + _feed_forward(c, layer, experts) + _norms(c) for layer in layers)


def _mtp(c: ModelConfig, experts: int) -> int:
    layers = range(c.num_hidden_layers, c.num_hidden_layers + c.num_nextn_predict_layers)
    return _blocks(c, layers, experts) + len(layers) * mtp_extra(c)


def _ends(c: ModelConfig) -> int:
    """Embedding, head and final norm."""
    head = c.num_labels or (0 if c.tie_word_embeddings else c.vocab_size)
    return (c.vocab_size + head + 1) * c.hidden_size


def parameters(config: ModelConfig, mtp: bool = False) -> int:
    """Trained parameters; with `mtp`, those of the MTP modules too (embedding and head are shared, so counted once)."""
    main = _blocks(config, range(config.num_hidden_layers), config.n_routed_experts) + _ends(config)
    return main + (_mtp(config, config.n_routed_experts) if mtp else 0)


def activated_parameters(config: ModelConfig) -> int:
    """Parameters that one token passes through, embedding and head included, MTP modules not."""
    return _blocks(config, range(config.num_hidden_layers), config.num_experts_per_tok) + _ends(config)


def kv_bytes_per_token(config: ModelConfig, value_bytes: int = 2) -> int:
    """Cache bytes per token over all layers of the main model."""
    return config.cache_width * config.num_hidden_layers * value_bytes


def kv_bytes_per_token_as(config: ModelConfig, key_heads: int, value_bytes: int = 2) -> int:
    """The same network's cache with plain keys and values of `key_heads` heads (all of them: MHA; 8: GQA; 1: MQA)."""
    if config.attention == "mla":
        width = key_heads * (config.qk_head_dim + config.v_head_dim)
    else:
        width = 2 * key_heads * config.gqa_head_dim
    return width * config.num_hidden_layers * value_bytes


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of forward and backward per token: 6 per matrix element that multiplies it, plus causal attention.

    The embedding is a look-up and norms are not counted. A token attends to seq_len / 2 others on average, with
    2·(dk + dv) FLOPs a head each in forward and twice that in backward. MTP modules count with their own head.
    """
    c = config
    elements = sum(_matrices(c, i) for i in range(c.num_hidden_layers)) + _matrices_after_layers(c)
    return 6.0 * elements + 3 * attention_flops(c, seq_len) * (c.num_hidden_layers + c.num_nextn_predict_layers)


def split_flops(c: ModelConfig, seq_len: int) -> tuple[float, float]:
    """`train_flops_per_token` of the last layer, which stands for all, and of what follows it: head and MTP modules."""
    core = 3 * attention_flops(c, seq_len)
    layer = 6.0 * _matrices(c, c.num_hidden_layers - 1) + core
    return layer, 6.0 * _matrices_after_layers(c) + c.num_nextn_predict_layers * core


def attention_flops(c: ModelConfig, seq_len: int) -> float:
    """Of one layer's scores and sums over values in forward, per token of a causal sequence."""
    head = c.qk_head_dim + c.v_head_dim if c.attention == "mla" else 2 * c.gqa_head_dim
    return 2.0 * c.num_attention_heads * head * (seq_len / 2)


def training_memory(config: ModelConfig, moment_bytes: int = 4, ema: bool = False) -> int:
    """Bytes of weights, gradients and optimizer state: float32 master weights and gradients, two moments, EMA."""
    return parameters(config, mtp=True) * (4 + 4 + 2 * moment_bytes + (4 if ema else 0))
