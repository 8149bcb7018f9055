"""A decoder written straight from its formulas in fp64, as an oracle for the engine.

No cache, no batches, no pages: the whole sequence at once, Hugging Face's half-split rotary order,
loops over heads. Shares nothing with the engine but the numbers of a `TinyPackage`.
"""

import math

import numpy as np


def logits(made, token_ids, *, kv="fp16", theta=None, kv_scale=None):
    """Return ``[num_tokens, vocab_size]`` fp64 for a text.

    Args:
        made: `tiny_package.TinyPackage`.
        token_ids: of the text.
        kv: "exact", "fp16", "online" or "static" keys and values.
        theta: rotary base, the model's when None.
        kv_scale: `KvScale` for "static".
    """
    model = made.model
    x = made.embedding[list(token_ids)].astype(np.float64)
    cos, sin = angles(model, len(x), theta or model.rope_theta)
    for index, layer in enumerate(made.layers):
        h = norm(x, layer.attention_norm, model)
        q = heads(h @ layer.q.astype(np.float64).T + layer.q_bias, model.head_dim)
        k = heads(h @ layer.k.astype(np.float64).T + layer.k_bias, model.head_dim)
        v = heads(h @ layer.v.astype(np.float64).T + layer.v_bias, model.head_dim)
        if model.has_qk_norm:
            q, k = norm(q, layer.q_norm, model), norm(k, layer.k_norm, model)
        if index not in model.layers_without_rope:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if model.use_logn_attn:
            n = np.arange(1, len(x) + 1)
            trained = model.max_position_embeddings
            q = q * np.where(n > trained, np.log(n) / math.log(trained), 1.0)[:, None, None]
        k, v = stored(k, kv, kv_scale, "k"), stored(v, kv, kv_scale, "v")
        x = x + attention(q, k, v) @ layer.o.astype(np.float64).T + layer.o_bias
        h = norm(x, layer.ffn_norm, model)
        gate, up = h @ layer.gate.astype(np.float64).T, h @ layer.up.astype(np.float64).T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer.down.astype(np.float64).T
    return norm(x, made.norm, model) @ made.head.astype(np.float64).T


def norm(x, weight, model):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + model.rms_norm_eps) * weight


def heads(columns, head_dim):
    return columns.reshape(len(columns), -1, head_dim)


def rotate(x, cos, sin):
    """Half-split: dimension i pairs with i + D/2."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def angles(model, count, theta):
    dim = model.head_dim
    scaling = model.rope_scaling
    frequencies = []
    for i in range(dim // 2):
        frequency = theta ** (-2 * i / dim)
        if scaling.kind == "linear":
            frequency /= scaling.factor
        if scaling.kind == "llama3":
            length = 2 * math.pi / frequency
            trained = scaling.original_max_position_embeddings
            if length > trained / scaling.low_freq_factor:
                frequency /= scaling.factor
            elif length >= trained / scaling.high_freq_factor:
                smooth = (trained / length - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        frequencies.append(frequency)
    turns = np.arange(count)[:, None] * np.array(frequencies)
    return np.cos(turns)[:, None, :], np.sin(turns)[:, None, :]


def attention(q, k, v):
    count, num_heads, dim = q.shape
    group = num_heads // k.shape[1]
    out = np.zeros_like(q)
    for head in range(num_heads):
        for row in range(count):
            scores = k[: row + 1, head // group] @ q[row, head] / math.sqrt(dim)
            weights = np.exp(scores - scores.max())
            out[row, head] = weights / weights.sum() @ v[: row + 1, head // group]
    return out.reshape(count, num_heads * dim)


def stored(x, kv, kv_scale, which):
    """What comes back from the cache, number by number (spec sections 4.4 and 4.5)."""
    if kv == "exact":
        return x
    if kv == "fp16":
        return x.astype(np.float16).astype(np.float64)
    if kv == "static":
        scale, zero = (getattr(kv_scale, f"{which}_{name}") for name in ("scale", "zero_point"))
        return (np.clip(np.rint((x - zero) / scale + 128), 0, 255) - 128) * scale + zero
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    scale = ((high - low) / 255).astype(np.float16)
    zero = low.astype(np.float16).astype(np.float64)
    inverse = (1 / scale.astype(np.float64)).astype(np.float16).astype(np.float64)
    return np.clip(np.rint((x - zero) * inverse), 0, 255) * scale.astype(np.float64) + zero
