"""The launches of one pass through the model: a decode step of some width, or new prompt tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from device_runtime.backends.cuda.kernel_set import KernelSet
from device_runtime.backends.cuda.linears import (
    MAX_GEMV_TOKENS,
    LayerMatrices,
    Linears,
    Matrix,
    PassSize,
    Step,
    layer_matrices,
)
from device_runtime.backends.cuda.weights import layer_name, padded_rows
from device_runtime.backends.cuda.workspace import RING_SIZE, StepLimits
from device_runtime.kernels.attention_shape import prefill_shared_bytes
from device_runtime.kernels.graphs import Launch
from device_runtime.kernels.head_shape import HeadShape, head_shapes
from device_runtime.kernels.sampling_row import DRAW_SHARED_BYTES
from device_runtime.package_format import names

LOG2_E = math.log2(math.e)
_KV_NAMES = {0: "half", 4: "static", 8: "online"}
_TOP_BLOCKS = 64
"""Blocks that look for the largest logit of a row."""


@dataclass(frozen=True)
class Memory:
    """Addresses of everything that a pass touches.

    Attributes:
        weights: of each joined tensor.
        buffers: of each buffer of `StepLimits.buffers`.
        kv: of each layer's pages.
        ring: of the pinned ring, as the device sees it.
    """

    weights: Mapping[str, int]
    buffers: Mapping[str, int]
    kv: Sequence[int]
    ring: int


class Programs:
    """Builds launches over one model's memory; keeps none."""

    def __init__(self, kernels: KernelSet, limits: StepLimits, memory: Memory) -> None:
        self._kernels = kernels
        self._limits = limits
        self._model = limits.model
        self._memory = memory
        self._buffers = memory.buffers
        self._linears = Linears(limits.model, kernels, memory.buffers)
        self._layers: list[LayerMatrices] = [
            layer_matrices(limits.model, memory.weights, index)
            for index in range(limits.model.num_hidden_layers)
        ]

    def decode(self, width: int, *, is_greedy: bool) -> list[Launch]:
        """Return one token for each of the first slots, from embedding to sampler.

        Args:
            width: slots.
            is_greedy: no slot draws at random.
        """
        b = self._buffers
        launches = [self._embed(width, b["tokens"], b["positions"], None)]
        for index in range(len(self._layers)):
            launches += self.decode_layer(index, width)
        launches += self._head(width, None)
        return launches + self.sample(width, None, is_greedy=is_greedy)

    def decode_layer(self, index: int, width: int) -> list[Launch]:
        """Return one layer's share of a decode step."""
        attention = [Step(self._decode_attention(index, width), None)]
        steps = self._layer_steps(index, self._layers[index], width, attention)
        return [step.launch for step in steps]

    def layer_weights(self, index: int) -> tuple[Matrix, ...]:
        """Return the matrices of a layer in the order in which a step reads them."""
        layer = self._layers[index]
        return (layer.qkv, layer.wo, layer.gate_up, layer.down)

    def prompt(self, num_tokens: int) -> list[Step]:
        """Return a pass over new tokens of prompts, without the head.

        With more tokens than a GEMV takes, it can be resized to any number of the same GEMM tile.
        """
        b = self._buffers
        embed = Step(
            self._embed(num_tokens, b["prompt_tokens"], b["prompt_positions"], b["prompt_slots"]),
            lambda size: ((self._embed_blocks, size.num_tokens, 1), {}),
        )
        steps = [embed]
        for index, layer in enumerate(self._layers):
            steps += self._layer_steps(index, layer, num_tokens, self._prompt_attention(index))
        return steps

    def program_key(self, num_tokens: int) -> int:
        """Return a number that passes share which fit each other's launches."""
        return self._linears.program_key(num_tokens)

    def head(self, num_rows: int) -> list[Launch]:
        """Return the logits of the tokens that ``head_rows`` names."""
        return self._head(num_rows, self._buffers["head_rows"])

    def sample(self, num_rows: int, slots: int | None, *, is_greedy: bool) -> list[Launch]:
        """Return the choice of a token for rows of logits.

        Args:
            num_rows: of logits.
            slots: address of each row's slot; None where row i is slot i.
            is_greedy: no row draws at random.
        """
        b, vocab_size = self._buffers, self._model.vocab_size
        state = (b["tokens"], b["positions"], b["seen"], self._memory.ring, b["logits"])
        rules = (b["sampling"], b["stop_ids"], b["last_positions"], slots)
        sizes = (vocab_size, padded_rows(self._model), self._limits.seen_words, RING_SIZE)
        blocks = max(1, min(_TOP_BLOCKS, vocab_size // 1024))
        top = self._kernels.launch(
            "sample_top_f32",
            (blocks, num_rows, 1),
            (b["top"], b["best"], b["sample_tickets"], *state, *rules, *sizes),
        )
        if is_greedy:
            return [top]
        draw = self._kernels.launch(
            "sample_draw_f32",
            (num_rows, 1, 1),
            (b["top"], *state, *rules, *sizes),
            shared_bytes=DRAW_SHARED_BYTES,
        )
        return [top, draw]

    def mark_seen(self, num_tokens: int) -> Launch:
        """Return the note that the prompt's tokens were seen."""
        b = self._buffers
        return self._kernels.launch(
            "mark_seen",
            (max(1, min(64, num_tokens // 256)), 1, 1),
            (b["seen"], b["prompt_tokens"], b["prompt_slots"], num_tokens, self._limits.seen_words),
        )

    @property
    def _embed_blocks(self) -> int:
        return max(1, min(4, self._model.hidden_size // 1024))

    def _embed(self, num_tokens: int, tokens: int, positions: int, slots: int | None) -> Launch:
        model, b = self._model, self._buffers
        trained = model.max_position_embeddings
        has_log_n = model.use_logn_attn and trained > 1
        return self._kernels.launch(
            "embed_f16",
            (self._embed_blocks, num_tokens, 1),
            (
                b["residual"],
                b["rotation"],
                b["query_scale"],
                self._memory.weights[names.TOK_EMBEDDINGS],
                tokens,
                positions,
                slots,
                b["turns"],
                model.hidden_size,
                model.head_dim // 2,
                trained,
                LOG2_E / math.sqrt(model.head_dim),
                1 / math.log(trained) if has_log_n else 0.0,
            ),
            is_first=True,
        )

    def _layer_steps(
        self, index: int, layer: LayerMatrices, num_tokens: int, attention: list[Step]
    ) -> list[Step]:
        b, linears = self._buffers, self._linears
        return [
            *linears.normed(b["qkv"], layer.qkv, layer.attention_norm, num_tokens, is_silu=False),
            *attention,
            *linears.added(b["mixed"], layer.wo, num_tokens),
            *linears.normed(b["inner"], layer.gate_up, layer.ffn_norm, num_tokens, is_silu=True),
            *linears.added(b["inner"], layer.down, num_tokens),
        ]

    def _norms(self, index: int) -> tuple[int | None, int | None]:
        weights = self._memory.weights
        return (
            weights.get(layer_name(index, names.Q_NORM, names.WEIGHT)),
            weights.get(layer_name(index, names.K_NORM, names.WEIGHT)),
        )

    def _rotation(self, index: int) -> int:
        is_plain = index not in self._model.layers_without_rope
        return self._buffers["rotation" if is_plain else "no_rotation"]

    def _kv_scales(self, index: int) -> tuple[int, ...]:
        if self._limits.layout.quant_policy != 4:
            return ()
        return (self._buffers["kv_scales"] + 16 * self._model.num_kv_heads * index,)

    @property
    def _kv_kind(self) -> str:
        return _KV_NAMES[self._limits.layout.quant_policy]

    @property
    def _attention_sizes(self) -> tuple[int, ...]:
        model, limits = self._model, self._limits
        return (
            model.num_attention_heads,
            model.num_kv_heads,
            model.head_dim,
            model.tensor_para_size,
            limits.layout.page_size,
            limits.max_pages,
        )

    def _decode_attention(self, index: int, width: int) -> Launch:
        b = self._buffers
        shape = self._limits.attention(width)
        slots = shape.ring_slots(self._limits.num_sms, self._kernels.max_shared_bytes)
        return self._kernels.launch(
            shape.kernel(self._kv_kind),
            shape.grid,
            (
                b["mixed"],
                self._memory.kv[index],
                b["partials"],
                b["qkv"],
                *self._norms(index),
                self._rotation(index),
                b["query_scale"],
                *self._kv_scales(index),
                b["positions"],
                b["page_table"],
                *self._attention_sizes,
                shape.max_splits,
                shape.split_units,
                slots,
                float(self._model.rms_norm_eps),
            ),
            shared_bytes=shape.shared_bytes(slots),
        )

    def _prompt_attention(self, index: int) -> list[Step]:
        b, heads = self._buffers, self._model.num_kv_heads
        q_norm, k_norm = self._norms(index)
        eps = float(self._model.rms_norm_eps)
        store = self._kernels.launch(
            f"store_kv_{self._kv_kind}",
            (heads, 1, 1),
            (
                self._memory.kv[index],
                b["qkv"],
                k_norm,
                self._rotation(index),
                *self._kv_scales(index),
                b["prompt_positions"],
                b["prompt_start"],
                b["prompt_spans"],
                b["prompt_pages"],
                *self._attention_sizes,
                eps,
            ),
        )
        attend = self._kernels.launch(
            f"prefill_attention_{self._kv_kind}",
            (heads, 1, 1),
            (
                b["mixed"],
                self._memory.kv[index],
                b["qkv"],
                q_norm,
                self._rotation(index),
                b["query_scale"],
                *self._kv_scales(index),
                b["prompt_positions"],
                b["prompt_start"],
                b["prompt_tiles"],
                b["prompt_pages"],
                *self._attention_sizes,
                eps,
            ),
            shared_bytes=prefill_shared_bytes(self._limits.layout),
        )
        return [
            Step(store, lambda size: ((heads, size.num_spans, 1), {})),
            Step(attend, lambda size: ((heads, size.num_tiles, 1), {})),
        ]

    def _head(self, num_rows: int, rows: int | None) -> list[Launch]:
        """Logits of the tokens that ``rows`` names, else of the first ones."""
        model = self._model
        shapes = head_shapes(
            num_rows,
            model.hidden_size,
            is_int8=model.head_type == "int8",
            max_shared_bytes=self._kernels.max_shared_bytes,
        )
        starts = accumulate((shape.num_rows for shape in shapes), initial=0)
        return [
            self._head_launch(shape, start, rows)
            for shape, start in zip(shapes, starts, strict=False)
        ]

    def _head_launch(self, shape: HeadShape, start: int, rows: int | None) -> Launch:
        model, b, weights = self._model, self._buffers, self._memory.weights
        if shape.is_int8:
            table: tuple[int, ...] = (weights[names.OUTPUT_QWEIGHT], weights[names.OUTPUT_SCALES])
        else:
            tied = model.tie_word_embeddings
            table = (weights[names.TOK_EMBEDDINGS if tied else names.OUTPUT],)
        first_row = 0 if rows is not None else 4 * start * model.hidden_size
        named = None if rows is None else rows + 4 * start
        return self._kernels.launch(
            shape.kernel,
            (shape.grid(self._kernels.num_sms, self._kernels.max_shared_bytes), 1, 1),
            (
                b["logits"] + 4 * start * padded_rows(model),
                b["residual"] + first_row,
                named,
                weights[names.FINAL_NORM],
                *table,
                shape.num_rows,
                model.hidden_size,
                padded_rows(model),
                float(model.rms_norm_eps),
            ),
            shared_bytes=shape.shared_bytes,
        )


class PromptPrograms:
    """Passes over prompts, fitted to each pass.

    Those of GEMMs are built at once, so that no first token waits for it; those of a few tokens,
    one for each number, when first needed.
    """

    def __init__(self, programs: Programs, max_tokens: int) -> None:
        self._programs = programs
        sizes = range(MAX_GEMV_TOKENS + 1, max_tokens + 1)
        built_for = {programs.program_key(size): size for size in sizes}
        self._built = {key: programs.prompt(size) for key, size in built_for.items()}

    def fitted(self, size: PassSize) -> list[Step]:
        """Return the steps of a pass of this size."""
        key = self._programs.program_key(size.num_tokens)
        if key not in self._built:
            self._built[key] = self._programs.prompt(size.num_tokens)
        steps = self._built[key]
        for step in steps:
            step.resize(size)
        return steps
