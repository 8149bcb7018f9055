"""4-bit packages with linears that stay fp16, from patterns and checkpoints to logits."""

import numpy as np
import pytest
import torch
from test_convert_bytes import GQA_64, int4_tensors
from tiny_checkpoints import add_biases, llama_tensors, write_checkpoint
from tiny_tokenizer import write_tokenizer

from device_runtime.backends.cuda.weights import weight_layout
from device_runtime.engine.engine import Engine, EngineOptions
from device_runtime.errors import UsageError
from device_runtime.package_format import names
from device_runtime.package_format.package import open_package
from host_tools.checkpoint import Checkpoint
from host_tools.checkpoint.mixed import kept_linears
from host_tools.convert import convert
from host_tools.evaluation_targets import CheckpointTarget
from host_tools.options import EvaluateOptions
from host_tools.package_options import ConvertOptions
from host_tools.progress import Progress

CPU = EvaluateOptions(seqlen=32, device="cpu")


def kept(*patterns, layers=3):
    return kept_linears(patterns, layers)


def test_a_pattern_names_linears_as_the_report_does():
    assert kept("layers.0.*").fp16_linears == (
        "layers.0.attention.w_qkv",
        "layers.0.attention.wo",
        "layers.0.feed_forward.w13",
        "layers.0.feed_forward.w2",
    )
    assert kept("*.down", "layers.1.o").fp16_linears == (
        "layers.0.feed_forward.w2",
        "layers.1.attention.wo",
        "layers.1.feed_forward.w2",
        "layers.2.feed_forward.w2",
    )
    assert kept().fp16_linears == ()
    assert kept("layers.[02].down").of_layer(2) == {"down"}


def test_a_pattern_that_splits_a_fused_matrix_takes_all_of_it_and_says_so():
    found = kept("*.v", "layers.1.up")
    assert found.of_layer(1) == {"q", "k", "v", "gate", "up"}
    assert found.of_layer(2) == {"q", "k", "v"}
    assert found.notes == (
        "keep-fp16: layers.0 keeps q and k and v together, which are one matrix in the package, "
        "4 such in all",
    )
    assert kept("layers.2.[qkv]").notes == ()


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("*.down", "layers.3.*"), r"keep-fp16 'layers\.3\.\*' matches no linear; they are called"),
        (("*.w2",), "with q, k, v, o, gate, up, down"),
        (("*",), "keeps every linear in fp16, use --method none"),
        (("*.[qo]", "*.gate", "*.down"), "keeps every linear in fp16"),
    ],
)
def test_patterns_that_cannot_be_are_refused(patterns, message):
    with pytest.raises(UsageError, match=message):
        kept(*patterns)


MIXED = {
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.1.self_attn.o_proj",
    "model.layers.1.mlp.gate_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.0.mlp.down_proj",
}
FP16_LINEARS = (
    "layers.0.attention.w_qkv",
    "layers.0.feed_forward.w2",
    "layers.1.attention.wo",
    "layers.1.feed_forward.w13",
)


def write_sources(tmp_path, kept_modules=MIXED):
    """An AWQ checkpoint, a float one, and one that has some modules of each."""
    config = GQA_64.config(architectures=["InternLMForCausalLM"], bias=True)
    codes, floats = int4_tensors(GQA_64, 64), llama_tensors(config)
    for tensors in (codes, floats):
        tensors.update({k: v for k, v in floats.items() if "_proj" not in k})
    add_biases(floats, ("q_proj", "k_proj", "v_proj", "o_proj"))
    codes.update({k: v for k, v in floats.items() if k.endswith(".bias")})
    mixed = {k: v for k, v in codes.items() if k.rpartition(".")[0] not in kept_modules}
    mixed |= {k: v for k, v in floats.items() if k.rpartition(".")[0] in kept_modules}
    for name, tensors in (("codes", codes), ("floats", floats), ("mixed", mixed)):
        write_tokenizer(write_checkpoint(tmp_path / name, config, tensors))
    return tmp_path


def converted(tmp_path, name, tp=1, notes=None, **options):
    progress = Progress()
    if notes is not None:
        progress.note = notes.append
    chosen = ConvertOptions("tiny", tp=tp, **options)
    return convert(tmp_path / name, tmp_path / f"tm-{name}", chosen, progress)


@pytest.mark.parametrize("tp", [1, 2])
def test_each_linear_lies_as_in_a_package_of_its_own_kind(tmp_path, tp):
    write_sources(tmp_path)
    found = {name: converted(tmp_path, name, tp) for name in ("codes", "floats", "mixed")}
    package = open_package(found["mixed"])
    assert package.model.fp16_linears == FP16_LINEARS
    assert package.model.weight_type == "int4"
    kinds = {"codes": 0, "floats": 0}
    for spec in package.specs:
        content = (found["mixed"] / spec.path).read_bytes()
        kind = "codes" if (found["codes"] / spec.path).exists() else "floats"
        kinds[kind] += 1
        assert content == (found[kind] / spec.path).read_bytes(), spec.name
    # Of layer 0 w_qkv and w2, of layer 1 wo, w1 and w3.
    assert kinds["floats"] == 5 * tp


def test_the_memory_plan_counts_fp16_linears_whole(tmp_path):
    write_sources(tmp_path)
    package = open_package(converted(tmp_path, "mixed"))
    # On the device every tensor starts at 256 bytes and a bias that ranks share lies once.
    planned = weight_layout(package.model).num_bytes - package.weight_bytes
    assert abs(planned) < 256 * len(package.specs)


@pytest.mark.parametrize("tp", [1, 2])
def test_the_engine_computes_what_the_dequantized_checkpoint_does(tmp_path, tp):
    write_sources(tmp_path)
    token_ids = np.random.default_rng(5).integers(0, GQA_64.vocab_size, 32).tolist()
    target = CheckpointTarget(tmp_path / "mixed", CPU)
    target.prepare(torch.tensor([token_ids], dtype=torch.int32), Progress())
    want = torch.cat(list(target.logits(0))).numpy()
    options = EngineOptions(backend="reference", quant_policy=0)
    with Engine.open(converted(tmp_path, "mixed", tp), options) as engine:
        got = engine.logits(token_ids)
    # Keys and values are rounded to fp16 in the cache.
    assert np.abs(got - want).max() < 2e-3 * np.abs(want).max()


def test_a_checkpoint_that_splits_a_fused_matrix_is_converted_to_fp16_there(tmp_path):
    write_sources(tmp_path, {"model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"})
    notes = []
    package = open_package(converted(tmp_path, "mixed", notes=notes))
    assert package.model.fp16_linears == ("layers.0.feed_forward.w2", "layers.1.attention.w_qkv")
    assert notes == [
        "convert: layers.1 has some of q, k, v in 4 bits and some not; what is one matrix in a "
        "package is stored in fp16 (1 in all)"
    ]
    checkpoint = Checkpoint.open(tmp_path / "mixed")
    v = package.tensor(names.layer_tensor(1, names.W_QKV, 0, names.WEIGHT))
    v = v[:, -checkpoint.model.kv_size :]
    assert np.array_equal(v.T, checkpoint.layer(1).v.weight.numpy())
