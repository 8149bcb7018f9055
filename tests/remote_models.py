"""Models whose own code is remote, written again from their papers, configs and tensor names.

Plain torch in fp32, one whole sequence at a time: what the packages of these families must give.
Attribute names are the published tensor names, so ``state_dict()`` is the checkpoint.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, theta: float, head_dim: int
) -> torch.Tensor:
    """Rotate ``[tokens, size]`` q and k in halves, and attend causally; heads share kv heads."""
    tokens = len(q)
    q, k, v = (x.view(tokens, -1, head_dim).transpose(0, 1) for x in (q, k, v))
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    turns = torch.outer(torch.arange(tokens, dtype=torch.float64), theta**-pairs).repeat(1, 2)
    cos, sin = turns.cos().float(), turns.sin().float()

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    shared = len(q) // len(k)
    k, v = rotate(k).repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
    scores = rotate(q) @ k.transpose(1, 2) / math.sqrt(head_dim)
    scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(tokens, -1)


def ntk_theta(theta: float, factor: float, tokens: int, trained: int, head_dim: int) -> float:
    """Dynamic NTK of InternLM 1 and 2: the base grows with the sequence."""
    if tokens <= trained:
        return theta
    return theta * (factor * tokens / trained - (factor - 1)) ** (head_dim / (head_dim - 2))


class Linear(nn.Linear):
    """``Linear(in, out, bias)``."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)


class LlamaMlp(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, inner)
        self.up_proj = Linear(hidden, inner)
        self.down_proj = Linear(inner, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class InternLMAttention(nn.Module):
    """Four separate projections, all with a bias where the config says so."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        for name in "qkvo":
            setattr(self, f"{name}_proj", Linear(hidden, hidden, config["bias"]))
        self.config = config

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        config = self.config
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        rotary = config["rotary"]
        theta = rotary["base"]
        if rotary["type"] == "dynamic":
            trained = config["max_position_embeddings"]
            factor = rotary.get("scaling_factor", 1.0)
            theta = ntk_theta(theta, factor, len(x), trained, head_dim)
        mixed = attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), theta, head_dim)
        return self.o_proj(mixed)


class BaichuanAttention(nn.Module):
    """W_pack: all of q, then all of k, then all of v."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.W_pack = Linear(hidden, 3 * hidden)
        self.o_proj = Linear(hidden, hidden)
        self.head_dim = hidden // config["num_attention_heads"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(attend(*self.W_pack(x).chunk(3, dim=-1), 10000.0, self.head_dim))


class LlamaLikeLayer(nn.Module):
    def __init__(self, config: dict, attention: type[nn.Module]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm, self.post_attention_layernorm = Norm(hidden, eps), Norm(hidden, eps)
        self.self_attn = attention(config)
        self.mlp = LlamaMlp(hidden, config["intermediate_size"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaLike(nn.Module):
    """The frame that InternLM and Baichuan took from Llama."""

    attention: type[nn.Module]

    def __init__(self, config: dict) -> None:
        super().__init__()
        table = (config["vocab_size"], config["hidden_size"])
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(*table)
        self.model.layers = nn.ModuleList(
            LlamaLikeLayer(config, self.attention) for _ in range(config["num_hidden_layers"])
        )
        self.model.norm = Norm(table[1], config["rms_norm_eps"])
        self.lm_head = Linear(table[1], table[0])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        return self.project(self.model.norm(x))

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(x)


class InternLM(LlamaLike):
    attention = InternLMAttention


class Baichuan(LlamaLike):
    attention = BaichuanAttention


class Baichuan2(Baichuan):
    """NormHead: the rows of the head have length 1."""

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, functional.normalize(self.lm_head.weight))


class InternLM2Layer(nn.Module):
    """wqkv holds, for each kv head, its query heads, then its key, then its value."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.config = config
        self.head_dim = hidden // config["num_attention_heads"]
        rows = hidden + 2 * config["num_key_value_heads"] * self.head_dim
        self.attention = nn.Module()
        self.attention.wqkv = Linear(hidden, rows, config["bias"])
        self.attention.wo = Linear(hidden, hidden, config["bias"])
        self.feed_forward = nn.Module()
        self.feed_forward.w1 = Linear(hidden, inner)
        self.feed_forward.w3 = Linear(hidden, inner)
        self.feed_forward.w2 = Linear(inner, hidden)
        self.attention_norm = Norm(hidden, config["rms_norm_eps"])
        self.ffn_norm = Norm(hidden, config["rms_norm_eps"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        config, tokens = self.config, len(x)
        theta, scaling = config["rope_theta"], config["rope_scaling"]
        if scaling is not None:
            trained = config["max_position_embeddings"]
            theta = ntk_theta(theta, scaling["factor"], tokens, trained, self.head_dim)
        groups = self.attention.wqkv(self.attention_norm(x))
        groups = groups.view(tokens, config["num_key_value_heads"], -1, self.head_dim)
        q, k, v = (
            part.reshape(tokens, -1)
            for part in (groups[:, :, :-2], groups[:, :, -2], groups[:, :, -1])
        )
        x = x + self.attention.wo(attend(q, k, v, theta, self.head_dim))
        normed, mlp = self.ffn_norm(x), self.feed_forward
        return x + mlp.w2(functional.silu(mlp.w1(normed)) * mlp.w3(normed))


class InternLM2(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        table = (config["vocab_size"], config["hidden_size"])
        self.model = nn.Module()
        self.model.tok_embeddings = nn.Embedding(*table)
        self.model.layers = nn.ModuleList(
            InternLM2Layer(config) for _ in range(config["num_hidden_layers"])
        )
        self.model.norm = Norm(table[1], config["rms_norm_eps"])
        self.output = Linear(table[1], table[0])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.model.tok_embeddings(ids)
        for layer in self.model.layers:
            x = layer(x)
        return self.output(self.model.norm(x))


class QwenLayer(nn.Module):
    """c_attn: q, k and v; intermediate_size counts w1 and w2; w2 is what SiLU goes over."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"] // 2
        size = config["kv_channels"] * config["num_attention_heads"]
        self.config = config
        self.ln_1 = Norm(hidden, config["layer_norm_epsilon"])
        self.ln_2 = Norm(hidden, config["layer_norm_epsilon"])
        self.attn = nn.Module()
        self.attn.c_attn = Linear(hidden, 3 * size, True)
        self.attn.c_proj = Linear(size, hidden)
        self.mlp = nn.Module()
        self.mlp.w1, self.mlp.w2 = Linear(hidden, inner), Linear(hidden, inner)
        self.mlp.c_proj = Linear(inner, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        config, tokens = self.config, len(x)
        q, k, v = self.attn.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        theta, trained = config["rotary_emb_base"], config["seq_length"]
        head_dim = config["kv_channels"]
        if config["use_dynamic_ntk"]:
            alpha = max(2 ** math.ceil(math.log2(tokens / trained) + 1) - 1, 1)
            theta *= alpha ** (head_dim / (head_dim - 2))
        if config["use_logn_attn"]:
            numbers = torch.arange(1, tokens + 1, dtype=torch.float64)
            factor = torch.where(numbers > trained, numbers.log() / math.log(trained), 1.0)
            q = q * factor[:, None].float()
        x = x + self.attn.c_proj(attend(q, k, v, theta, head_dim))
        normed = self.ln_2(x)
        return x + self.mlp.c_proj(self.mlp.w1(normed) * functional.silu(self.mlp.w2(normed)))


class Qwen(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        table = (config["vocab_size"], config["hidden_size"])
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(*table)
        self.transformer.h = nn.ModuleList(
            QwenLayer(config) for _ in range(config["num_hidden_layers"])
        )
        self.transformer.ln_f = Norm(table[1], config["layer_norm_epsilon"])
        self.lm_head = Linear(table[1], table[0])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.transformer.wte(ids)
        for layer in self.transformer.h:
            x = layer(x)
        return self.lm_head(self.transformer.ln_f(x))
