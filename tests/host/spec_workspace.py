"""The TurboMind workspace as the specification states it, for the tests of convert.

Nothing here is shared with the package format: every formula is written again from its words.
"""

import numpy as np
import torch

AWQ_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)  # spec section 2.1, P


def awq_words(codes):
    """[K, M] codes -> int32 [K, M / 8]: column c of a word sits at nibble P[c]."""
    rows, columns = codes.shape
    words = np.zeros((rows, columns // 8), np.uint32)
    for column in range(columns):
        shift = 4 * AWQ_NIBBLE_OF_COLUMN[column % 8]
        words[:, column // 8] |= codes[:, column].astype(np.uint32) << np.uint32(shift)
    return words.view(np.int32)


def turbomind_words(codes):
    """[K, M] codes -> bytes of a qweight file, by the three formulas of spec section 2.4."""
    inputs, outputs = codes.shape
    k, m = np.meshgrid(np.arange(inputs), np.arange(outputs), indexing="ij")
    lane = (m % 8) * 4 + (k % 8) // 2
    tile = (k // 32) * (outputs // 32) + m // 32
    word = ((tile * 32 + lane) * 2 + (k % 32) // 16) * 2 + (m % 32) // 16
    nibble = (k % 2) * 4 + ((k % 16) // 8) * 2 + (m % 16) // 8
    words = np.zeros(inputs * outputs // 8, np.uint32)
    np.bitwise_or.at(words, word, codes.astype(np.uint32) << (4 * nibble).astype(np.uint32))
    return words.astype("<u4").tobytes()


def scales_zeros(scales, zeros):
    """[G, M] fp16 and codes -> bytes: low half fp16 of 64 + zero, high half the scale (2.5)."""
    low = (64 + zeros.astype(np.float32)).astype(np.float16).view(np.uint16).astype(np.uint32)
    high = scales.astype(np.float16).view(np.uint16).astype(np.uint32)
    return (low | high << np.uint32(16)).astype("<u4").tobytes()


def pair_columns(columns, head_dim):
    """new[h*D + 2*i + j] = old[h*D + j*D/2 + i] on the last axis (spec section 1.2)."""
    new = np.empty_like(columns)
    for head in range(columns.shape[-1] // head_dim):
        for i in range(head_dim // 2):
            for j in range(2):
                old = columns[..., head * head_dim + j * head_dim // 2 + i]
                new[..., head * head_dim + 2 * i + j] = old
    return new


def rank_columns(columns, rank, tp):
    width = columns.shape[-1] // tp
    return columns[..., rank * width : (rank + 1) * width]


def rank_rows(rows, rank, tp):
    height = rows.shape[0] // tp
    return rows[rank * height : (rank + 1) * height]


def fused_qkv(q, k, v, head_dim, rank, tp):
    """[q of the rank | k of the rank | v of the rank], q and k with rotary pairs."""
    return np.concatenate(
        [
            rank_columns(pair_columns(q, head_dim), rank, tp),
            rank_columns(pair_columns(k, head_dim), rank, tp),
            rank_columns(v, rank, tp),
        ],
        axis=-1,
    )


def interleaved(w1, w3):
    """Column 2i is w1's column i, column 2i + 1 is w3's."""
    both = np.empty((*w1.shape[:-1], 2 * w1.shape[-1]), w1.dtype)
    both[..., 0::2], both[..., 1::2] = w1, w3
    return both


def raw(tensor, dtype):
    """The bytes of a tensor in the file's element type, rounded as torch rounds (to even)."""
    converted = tensor.to(dtype).contiguous()
    return converted.view(torch.int16).numpy().astype("<i2").tobytes()


def bits(tensor, dtype):
    """The tensor's 16-bit patterns as an array that numpy can rearrange."""
    return tensor.to(dtype).contiguous().view(torch.int16).numpy()


def layer_files(tensors, layer, shape, tp, dtype):
    """Every weight file of one layer, name -> bytes (spec sections 1.2, 1.3 and 1.4)."""
    source, target = f"model.layers.{layer}.", f"layers.{layer}."
    files = {
        f"{target}attention_norm.weight": raw(tensors[f"{source}input_layernorm.weight"], dtype),
        f"{target}ffn_norm.weight": raw(tensors[f"{source}post_attention_layernorm.weight"], dtype),
    }
    if f"{source}self_attn.q_norm.weight" in tensors:
        for name in ("q_norm", "k_norm"):
            norm = bits(tensors[f"{source}self_attn.{name}.weight"], dtype)
            files[f"{target}attention.{name}.weight"] = pair_columns(norm, shape.head_dim).tobytes()
    for rank in range(tp):
        if f"{source}self_attn.q_proj.qweight" in tensors:
            files |= _int4_rank(tensors, source, target, shape, rank, tp)
        else:
            files |= _dense_rank(tensors, source, target, shape, rank, tp, dtype)
        if f"{source}self_attn.q_proj.bias" in tensors:
            files |= _bias_rank(tensors, source, target, shape, rank, tp, dtype)
    return files


def _dense_rank(tensors, source, target, shape, rank, tp, dtype):
    def linear(name):
        return bits(tensors[f"{source}{name}.weight"], dtype).T  # input-major

    qkv = [linear(f"self_attn.{name}_proj") for name in "qkv"]
    parts = {
        f"attention.w_qkv.{rank}": fused_qkv(*qkv, shape.head_dim, rank, tp),
        f"attention.wo.{rank}": rank_rows(linear("self_attn.o_proj"), rank, tp),
        f"feed_forward.w1.{rank}": rank_columns(linear("mlp.gate_proj"), rank, tp),
        f"feed_forward.w3.{rank}": rank_columns(linear("mlp.up_proj"), rank, tp),
        f"feed_forward.w2.{rank}": rank_rows(linear("mlp.down_proj"), rank, tp),
    }
    return {f"{target}{name}.weight": part.tobytes() for name, part in parts.items()}


def _int4_rank(tensors, source, target, shape, rank, tp):
    def parts(name):
        """codes, zeros and scales of a linear, unpacked by the words of section 2.1."""
        linear = f"{source}{name}."
        return (
            unpacked(tensors[f"{linear}qweight"].numpy()),
            unpacked(tensors[f"{linear}qzeros"].numpy()),
            tensors[f"{linear}scales"].to(torch.float16).numpy(),
        )

    q, k, v = (parts(f"self_attn.{name}_proj") for name in "qkv")
    o, down = parts("self_attn.o_proj"), parts("mlp.down_proj")
    gate, up = parts("mlp.gate_proj"), parts("mlp.up_proj")
    local = {
        f"attention.w_qkv.{rank}": [
            fused_qkv(q[i], k[i], v[i], shape.head_dim, rank, tp) for i in range(3)
        ],
        f"attention.wo.{rank}": [rank_rows(o[i], rank, tp) for i in range(3)],
        f"feed_forward.w13.{rank}": [
            rank_columns(interleaved(gate[i], up[i]), rank, tp) for i in range(3)
        ],
        f"feed_forward.w2.{rank}": [rank_rows(down[i], rank, tp) for i in range(3)],
    }
    files = {}
    for name, (codes, zeros, scales) in local.items():
        files[f"{target}{name}.qweight"] = turbomind_words(codes)
        files[f"{target}{name}.scales_zeros"] = scales_zeros(scales, zeros)
    return files


def _bias_rank(tensors, source, target, shape, rank, tp, dtype):
    qkv = [bits(tensors[f"{source}self_attn.{name}_proj.bias"], dtype) for name in "qkv"]
    if f"{source}self_attn.o_proj.bias" in tensors:
        output = bits(tensors[f"{source}self_attn.o_proj.bias"], dtype)
    else:
        output = np.zeros(shape.hidden_size, np.int16)
    return {
        f"{target}attention.w_qkv.{rank}.bias": fused_qkv(*qkv, shape.head_dim, rank, tp).tobytes(),
        f"{target}attention.wo.{rank}.bias": output.tobytes(),
    }


def unpacked(words):
    """[K, M / 8] int32 -> [K, M] codes."""
    unsigned = words.view(np.uint32)
    codes = np.empty((words.shape[0], words.shape[1] * 8), np.uint8)
    for column in range(codes.shape[1]):
        shift = np.uint32(4 * AWQ_NIBBLE_OF_COLUMN[column % 8])
        codes[:, column] = (unsigned[:, column // 8] >> shift) & 15
    return codes


def model_files(tensors, shape, tp, dtype):
    """Every weight file of the model, name -> bytes."""
    padding = -shape.vocab_size % tp

    def padded(name):
        rows = bits(tensors[name], dtype)
        return np.concatenate([rows, np.zeros((padding, rows.shape[1]), np.int16)]).tobytes()

    files = {
        "tok_embeddings.weight": padded("model.embed_tokens.weight"),
        "norm.weight": raw(tensors["model.norm.weight"], dtype),
    }
    if "lm_head.weight" in tensors:
        files["output.weight"] = padded("lm_head.weight")
    for layer in range(shape.num_hidden_layers):
        files |= layer_files(tensors, layer, shape, tp, dtype)
    return files
