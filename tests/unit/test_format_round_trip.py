"""A layer of AWQ words through the files of a package and back, as convert and an engine go."""

import dataclasses

import numpy as np
import pytest
from format_samples import INT4, write_workspace

from device_runtime.package_format import fusion, int4, names, rotary
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.package import open_package
from device_runtime.package_format.tensors import linear_shapes
from device_runtime.package_format.workspace import WorkspaceWriter


def model_of(head_dim, group_size, ranks):
    return ModelConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        vocab_size=70,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=128,
        weight_type="int4",
        group_size=group_size,
        tensor_para_size=ranks,
    )


def random_awq(model):
    """Checkpoint tensors of one layer: (qweight, qzeros, scales) of each linear."""
    rng = np.random.default_rng(model.head_dim + model.group_size)
    sizes = {
        "q": (model.hidden_size, model.q_size),
        "k": (model.hidden_size, model.kv_size),
        "v": (model.hidden_size, model.kv_size),
        "o": (model.q_size, model.hidden_size),
        "gate": (model.hidden_size, model.intermediate_size),
        "up": (model.hidden_size, model.intermediate_size),
        "down": (model.intermediate_size, model.hidden_size),
    }
    return {
        name: (
            rng.integers(-(2**31), 2**31, (inputs, outputs // 8), np.int32),
            rng.integers(-(2**31), 2**31, (inputs // model.group_size, outputs // 8), np.int32),
            rng.standard_normal((inputs // model.group_size, outputs)).astype(np.float16),
        )
        for name, (inputs, outputs) in sizes.items()
    }


def write_layer(writer, model, checkpoint):
    """What convert does, with the functions of the format alone."""
    fields = {
        name: (int4.unpack_awq(words), int4.unpack_awq(zeros), scales)
        for name, (words, zeros, scales) in checkpoint.items()
    }
    ranks, head_dim = model.tensor_para_size, model.head_dim
    fused = {
        names.W_QKV: [
            fusion.fuse_qkv(rotary.to_pairs(q, head_dim), rotary.to_pairs(k, head_dim), v, ranks)
            for q, k, v in zip(fields["q"], fields["k"], fields["v"], strict=True)
        ],
        names.WO: [fusion.split_rows(field, ranks) for field in fields["o"]],
        names.W13: [
            fusion.split_columns(fusion.fuse_w13(gate, up), ranks)
            for gate, up in zip(fields["gate"], fields["up"], strict=True)
        ],
        names.W2: [fusion.split_rows(field, ranks) for field in fields["down"]],
    }
    for module, parts in fused.items():
        for rank, (codes, zeros, scales) in enumerate(zip(*parts, strict=True)):
            words = int4.pack_words(codes)
            writer.write(names.layer_tensor(0, module, rank, names.QWEIGHT), words)
            pairs = int4.pack_scales_zeros(scales, zeros)
            writer.write(names.layer_tensor(0, module, rank, names.SCALES_ZEROS), pairs)


def read_layer(package):
    """What an engine does, back to the words of the checkpoint."""
    model = package.model
    heads = (model.num_attention_heads, model.num_kv_heads, model.head_dim)
    parts = {}
    for shape in linear_shapes(model, 0):
        for rank in range(model.tensor_para_size):
            words = package.tensor(names.layer_tensor(0, shape.module, rank, names.QWEIGHT))
            pairs = package.tensor(names.layer_tensor(0, shape.module, rank, names.SCALES_ZEROS))
            codes = int4.unpack_words(words, shape.num_inputs, shape.num_outputs)
            scales, zeros = int4.unpack_scales_zeros(pairs)
            parts.setdefault(shape.module, []).append((codes, zeros, scales))
    qkv = [fusion.split_qkv(field, *heads) for field in zip(*parts[names.W_QKV], strict=True)]
    gate_up = [
        fusion.split_w13(fusion.join_columns(field))
        for field in zip(*parts[names.W13], strict=True)
    ]
    fields = {
        "q": [rotary.to_halves(q, model.head_dim) for q, _, _ in qkv],
        "k": [rotary.to_halves(k, model.head_dim) for _, k, _ in qkv],
        "v": [v for _, _, v in qkv],
        "o": [fusion.join_rows(field) for field in zip(*parts[names.WO], strict=True)],
        "gate": [gate for gate, _ in gate_up],
        "up": [up for _, up in gate_up],
        "down": [fusion.join_rows(field) for field in zip(*parts[names.W2], strict=True)],
    }
    return {
        name: (int4.pack_awq(codes), int4.pack_awq(zeros), scales)
        for name, (codes, zeros, scales) in fields.items()
    }


@pytest.mark.parametrize(
    ("head_dim", "group_size", "ranks"),
    [(64, 32, 1), (64, 64, 2), (128, 128, 1), (128, 128, 2), (64, 128, 2), (80, 64, 1)],
)
def test_awq_words_survive_the_package(tmp_path, head_dim, group_size, ranks):
    model = model_of(head_dim, group_size, ranks)
    write_workspace(tmp_path, model, is_sealed=False)
    checkpoint = random_awq(model)
    write_layer(WorkspaceWriter(tmp_path, model), model, checkpoint)
    again = read_layer(open_package(tmp_path))
    assert again.keys() == checkpoint.keys()
    for name, tensors in checkpoint.items():
        for before, after in zip(tensors, again[name], strict=True):
            assert after.tobytes() == before.tobytes(), name


def test_ranks_hold_what_one_rank_holds(tmp_path):
    one, two = model_of(64, 64, 1), model_of(64, 64, 2)
    checkpoint = random_awq(one)
    for model, folder in ((one, "one"), (two, "two")):
        (tmp_path / folder).mkdir()
        write_workspace(tmp_path / folder, model, is_sealed=False)
        write_layer(WorkspaceWriter(tmp_path / folder, model), model, checkpoint)
    # Rows of a split are byte ranges; wo of rank 1 is the second half of the whole.
    for kind in (names.QWEIGHT, names.SCALES_ZEROS):
        whole = open_package(tmp_path / "one").tensor(names.layer_tensor(0, names.WO, 0, kind))
        parts = [
            open_package(tmp_path / "two").tensor(names.layer_tensor(0, names.WO, rank, kind))
            for rank in (0, 1)
        ]
        assert whole.tobytes() == b"".join(part.tobytes() for part in parts)


def test_float_weights_and_biases_use_the_same_columns():
    model = dataclasses.replace(INT4, num_attention_heads=4, num_kv_heads=2)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (model.hidden_size, model.q_size), np.uint8)
    zeros = np.zeros((2, model.q_size), np.uint8)
    scales = rng.random((2, model.q_size)).astype(np.float16)
    weights = int4.dequantize(codes, zeros, scales, group_size=32)
    reordered = int4.dequantize(
        rotary.to_pairs(codes, 32), zeros, rotary.to_pairs(scales, 32), group_size=32
    )
    assert rotary.to_pairs(weights, 32).tobytes() == reordered.tobytes()
