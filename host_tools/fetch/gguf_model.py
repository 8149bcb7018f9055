"""What a GGUF file says about its model: the checkpoint's config and where each tensor comes from.

GGUF metadata keys and tensor names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from device_runtime.errors import PackageError
from host_tools.fetch.gguf_header import GgufHeader
from host_tools.fetch.gguf_metadata import Metadata, shortest
from host_tools.fetch.gguf_rope import ROPE_FREQS, rope_scaling


@dataclass(frozen=True)
class GgufFamily:
    """How one GGUF architecture maps to a Hugging Face one.

    Attributes:
        architecture: the value of ``general.architecture``.
        hf_architecture: class name for ``architectures`` in config.json.
        model_type: of config.json.
        has_pair_order: rows of q and k lie in adjacent rotary pairs, as llama.cpp's converter
            permutes them for its NORM rope; the NEOX families keep halves.
        has_qkv_bias: q, k and v always have a bias and o never; otherwise all or none have one.
        has_qk_norm: per-head norms of q and k.
    """

    architecture: str
    hf_architecture: str
    model_type: str
    has_pair_order: bool = False
    has_qkv_bias: bool = False
    has_qk_norm: bool = False


FAMILIES = (
    GgufFamily("llama", "LlamaForCausalLM", "llama", has_pair_order=True),
    # llama.cpp's converter splits InternLM2's wqkv and permutes q and k: what is left is Llama.
    GgufFamily("internlm2", "LlamaForCausalLM", "llama", has_pair_order=True),
    GgufFamily("qwen2", "Qwen2ForCausalLM", "qwen2", has_qkv_bias=True),
    GgufFamily("qwen3", "Qwen3ForCausalLM", "qwen3", has_qk_norm=True),
)

EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the checkpoint.

    Attributes:
        name: in the checkpoint.
        source: in the GGUF file.
        shape: outermost dimension first.
        rotary_head_dim: above 0 when rows must go from pair order to halves.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    rotary_head_dim: int = 0


@dataclass(frozen=True)
class GgufModel:
    """Sizes and tensors of one model, checked against each other.

    Attributes:
        config: config.json but for the special token ids.
        tensors: everything the checkpoint needs, in the order in which a model runs.
    """

    config: Mapping[str, object]
    tensors: tuple[SourceTensor, ...]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.tensors[0].shape[0]


def describe_model(header: GgufHeader) -> GgufModel:
    """Read config and tensors of a GGUF file.

    Raises:
        PackageError: the architecture or a feature is one that does not run here, or names, sizes
            and tensors of the file do not agree.
    """
    metadata = Metadata(header)
    _check_is_whole_model(header, metadata)
    family = _find_family(metadata)
    sizes = _Sizes.read(header, metadata, family.architecture)
    tensors = tuple(_expected_tensors(header, family, sizes))
    _check_tensors(header, tensors)
    config: dict[str, object] = {
        "architectures": [family.hf_architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocab,
        "rms_norm_eps": sizes.eps,
        "rope_theta": sizes.theta,
        "rope_scaling": rope_scaling(header, family.architecture, sizes.theta, sizes.head_dim),
        "max_position_embeddings": sizes.context,
        "tie_word_embeddings": OUTPUT not in header.tensors,
        "attention_bias": "blk.0.attn_output.bias" in header.tensors,
        "torch_dtype": "float16",
    }
    if family.model_type == "llama":
        config["mlp_bias"] = False
    return GgufModel(config, tensors)


def _check_is_whole_model(header: GgufHeader, metadata: Metadata) -> None:
    name = metadata.file_name
    kind = metadata.text("general.type", "model")
    if kind != "model":
        raise PackageError(f"{name} holds a {kind!r}, expected a whole model")
    if "split.count" in metadata and metadata.size("split.count") > 1:
        raise PackageError(
            f"{name} is one of {metadata.size('split.count')} parts of a split GGUF, join them "
            "with llama-gguf-split --merge first"
        )
    if EMBEDDING not in header.tensors:
        raise PackageError(f"{name} has no tensor {EMBEDDING}, expected a whole model")


def _find_family(metadata: Metadata) -> GgufFamily:
    architecture = metadata.text("general.architecture")
    for family in FAMILIES:
        if family.architecture == architecture:
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise PackageError(
        f"{metadata.file_name} holds a model of architecture {architecture[:80]!r}, expected one "
        f"of {known}"
    )


@dataclass(frozen=True)
class _Sizes:
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    eps: float
    theta: float

    @staticmethod
    def read(header: GgufHeader, metadata: Metadata, prefix: str) -> _Sizes:
        """Read the sizes of a model.

        Raises:
            PackageError: one is missing or impossible, or the model is a mixture of experts or
                turns only part of each head.
        """
        if metadata.size(f"{prefix}.expert_count", 1) > 1:
            raise PackageError(
                f"{metadata.file_name} is a mixture of {metadata.size(f'{prefix}.expert_count')} "
                "experts, only dense models run"
            )
        hidden = metadata.size(f"{prefix}.embedding_length")
        heads = metadata.size(f"{prefix}.attention.head_count")
        kv_heads = metadata.size(f"{prefix}.attention.head_count_kv", heads)
        head_dim = metadata.size(f"{prefix}.attention.key_length", max(1, hidden // heads))
        for key in ("attention.value_length", "rope.dimension_count"):
            if metadata.size(f"{prefix}.{key}", head_dim) != head_dim:
                raise PackageError(
                    f"{prefix}.{key} of {metadata.file_name} is "
                    f"{metadata.size(f'{prefix}.{key}')}, expected the head size {head_dim}"
                )
        if head_dim % 2 or heads % kv_heads:
            raise PackageError(
                f"{metadata.file_name} has {heads} heads of {head_dim} over {kv_heads} kv heads, "
                "expected an even head size and whole groups"
            )
        layers = metadata.size(f"{prefix}.block_count")
        if layers > len(header.tensors):
            raise PackageError(
                f"{metadata.file_name} claims {layers} layers, but holds {len(header.tensors)} "
                "tensors in all"
            )
        return _Sizes(
            layers=layers,
            hidden=hidden,
            intermediate=metadata.size(f"{prefix}.feed_forward_length"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=header.tensors[EMBEDDING].shape[0],
            context=metadata.size(f"{prefix}.context_length"),
            eps=shortest(metadata.number(f"{prefix}.attention.layer_norm_rms_epsilon")),
            theta=shortest(metadata.number(f"{prefix}.rope.freq_base", 10000.0)),
        )


def _expected_tensors(
    header: GgufHeader, family: GgufFamily, sizes: _Sizes
) -> Iterator[SourceTensor]:
    q_size, kv_size = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    turned = sizes.head_dim if family.has_pair_order else 0
    yield SourceTensor("model.embed_tokens.weight", EMBEDDING, (sizes.vocab, sizes.hidden))
    for layer in range(sizes.layers):
        old, new = f"blk.{layer}.", f"model.layers.{layer}."
        yield SourceTensor(
            f"{new}input_layernorm.weight", f"{old}attn_norm.weight", (sizes.hidden,)
        )
        for part, rows, columns, rotary in (
            ("q", q_size, sizes.hidden, turned),
            ("k", kv_size, sizes.hidden, turned),
            ("v", kv_size, sizes.hidden, 0),
            ("o", sizes.hidden, q_size, 0),
        ):
            source = f"{old}attn_output" if part == "o" else f"{old}attn_{part}"
            target = f"{new}self_attn.{part}_proj"
            yield SourceTensor(f"{target}.weight", f"{source}.weight", (rows, columns), rotary)
            always = family.has_qkv_bias and part != "o"
            if always or (not family.has_qkv_bias and f"{old}attn_q.bias" in header.tensors):
                yield SourceTensor(f"{target}.bias", f"{source}.bias", (rows,), rotary)
        if family.has_qk_norm:
            for part in ("q", "k"):
                name = f"{new}self_attn.{part}_norm.weight"
                yield SourceTensor(name, f"{old}attn_{part}_norm.weight", (sizes.head_dim,))
        name = f"{new}post_attention_layernorm.weight"
        yield SourceTensor(name, f"{old}ffn_norm.weight", (sizes.hidden,))
        wide = (sizes.intermediate, sizes.hidden)
        yield SourceTensor(f"{new}mlp.gate_proj.weight", f"{old}ffn_gate.weight", wide)
        yield SourceTensor(f"{new}mlp.up_proj.weight", f"{old}ffn_up.weight", wide)
        yield SourceTensor(f"{new}mlp.down_proj.weight", f"{old}ffn_down.weight", wide[::-1])
    yield SourceTensor("model.norm.weight", "output_norm.weight", (sizes.hidden,))
    if OUTPUT in header.tensors:
        yield SourceTensor("lm_head.weight", OUTPUT, (sizes.vocab, sizes.hidden))


def _check_tensors(header: GgufHeader, expected: tuple[SourceTensor, ...]) -> None:
    """Check that the file has the expected tensors and no other.

    Raises:
        PackageError: a tensor is missing, of another shape, or one that does not belong.
    """
    file_name = header.path.name
    for tensor in expected:
        found = header.tensors.get(tensor.source)
        if found is None:
            raise PackageError(f"{file_name} has no tensor {tensor.source}")
        if found.shape != tensor.shape:
            raise PackageError(
                f"tensor {tensor.source} of {file_name} has shape {list(found.shape)}, expected "
                f"{list(tensor.shape)}"
            )
    extra = sorted(set(header.tensors) - {tensor.source for tensor in expected} - {ROPE_FREQS})
    if extra:
        raise PackageError(
            f"{file_name} has {len(extra)} tensors such as {extra[0][:80]!r} that no supported "
            "model has"
        )
