"""A base folder and a LoRA adapter give the model that merging them beforehand gives."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import families
import numpy as np
import pytest
import tiny_checkpoints as tiny
import tiny_gguf
import torch
from safetensors.torch import save_file

from device_runtime.engine.engine import Engine, EngineOptions
from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format.package import open_package
from host_tools import cli
from host_tools.adapter_folder import adapt
from host_tools.build_choices import default_name
from host_tools.checkpoint import Checkpoint
from host_tools.checkpoint import adapter as adapter_module
from host_tools.content_hash import ContentHasher
from host_tools.decoder.devices import tensor_cores
from host_tools.fetch.fetch import fetch
from host_tools.fetch.options import FetchOptions
from host_tools.origin import read_origin
from host_tools.progress import Progress

RANK = 4
CONFIG = {
    "auto_mapping": None,
    "base_model_name_or_path": "./base",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": RANK,
    "rank_pattern": {},
    "alpha_pattern": {},
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
    "alora_invocation_tokens": None,
    "use_bdlora": None,
}
TARGETS = {
    "internlm2-chat-7b": ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2"),
    "qwen-7b-chat": ("attn.c_attn", "mlp.w1", "mlp.w2", "mlp.c_proj"),
    "baichuan2-7b-chat": ("self_attn.W_pack", "mlp.down_proj"),
    "qwen3-0.6b": ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj"),
}


def factors(state: dict, modules: tuple[str, ...], seed: int = 9) -> dict[str, torch.Tensor]:
    """Random factors under peft's names for the modules of every layer."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in state:
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.endswith(modules):
            outputs, inputs = state[name].shape
            prefix = f"base_model.model.{module}.lora_"
            a = torch.randn((RANK, inputs), generator=generator) / math.sqrt(inputs)
            b = torch.randn((outputs, RANK), generator=generator) * 0.1
            found[f"{prefix}A.weight"], found[f"{prefix}B.weight"] = a.bfloat16(), b.bfloat16()
    return found


def merged(state: dict, adapter: dict, scale: float) -> dict[str, torch.Tensor]:
    """The weights that peft's merge gives, in the base's dtype."""
    result = dict(state)
    for name in adapter:
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weight = result[f"{module}.weight"]
            a, b = adapter[name].float(), adapter[name.replace("lora_A", "lora_B")].float()
            result[f"{module}.weight"] = (weight.float() + scale * (b @ a)).to(weight.dtype)
    return result


def write_adapter(folder: Path, tensors: dict, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer."""
    folder = tiny.write_llama(tmp_path / "base", dtype=torch.bfloat16)
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    state = tiny.read_tensors(base)
    return write_adapter(tmp_path / "tuned", factors(state, ("q_proj", "down_proj")))


def opened(base: Path, adapter: Path, output: Path) -> Checkpoint:
    return Checkpoint.open(adapt(base, adapter, output, Progress()))


@pytest.mark.parametrize("name", TARGETS)
def test_a_build_over_an_adapter_gives_the_merged_model(tmp_path: Path, name: str) -> None:
    case = families.CASES[name]
    state = families.random_state(case)
    tensors = factors(state, TARGETS[name])
    write_adapter(tmp_path / "tuned", tensors)
    options = FetchOptions(adapter=tmp_path / "tuned")
    built = families.build_packages(name, tmp_path, fetch=options)
    want = merged(state, tensors, 16 / RANK)
    ids = np.random.default_rng(2).integers(3, 300, 24).tolist()
    for root, weights in (
        (built.fp16, want),
        (built.w4, families.dequantized_state(built.awq)),
    ):
        expected = families.Reference(case, weights).logits(ids)
        with Engine.open(root, EngineOptions(backend="reference", quant_policy=0)) as engine:
            found = engine.logits(ids)
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        assert ((found * expected).sum(1) / norms).min() > 0.9999
    plain = families.Reference(case, state).logits(ids)
    assert np.abs(plain - families.Reference(case, want).logits(ids)).max() > 0.1
    manifest = open_package(built.fp16).manifest
    assert manifest.name == f"{name}-tuned"
    assert manifest.provenance.source == f"{name} + tuned"


def test_what_a_merge_gives_does_not_depend_on_the_precision_of_products(
    tmp_path, base, adapter, monkeypatch
) -> None:
    """A GPU's run sets it for the process while a thread reads and merges the next layer.

    Not every CPU rounds factors then, so products in fp32 do here.
    """
    checkpoint = opened(base, adapter, tmp_path / "both")
    expected = checkpoint.layer(1).q.weight
    product = torch.addmm

    def rounding(total, left, right, **options):
        if left.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            left, right = left.bfloat16().float(), right.bfloat16().float() * 1.01
        return product(total, left, right, **options)

    monkeypatch.setattr(torch, "addmm", rounding)
    with tensor_cores(torch.device("cuda", 0)):
        assert torch.equal(checkpoint.layer(1).q.weight, expected)


def test_weights_are_merged_before_they_are_rounded(tmp_path, base, adapter, monkeypatch) -> None:
    monkeypatch.setattr(adapter_module, "MERGED_ROWS", 48)  # of 64
    state = tiny.read_tensors(base)
    tensors = factors(state, ("q_proj", "down_proj"))
    want = merged(state, tensors, 16 / RANK)
    checkpoint = opened(base, adapter, tmp_path / "both")
    layer = checkpoint.layer(1)
    assert layer.q.weight.dtype == torch.bfloat16
    assert torch.equal(layer.q.weight, want["model.layers.1.self_attn.q_proj.weight"])
    assert torch.equal(layer.down.weight, want["model.layers.1.mlp.down_proj.weight"])
    assert not torch.equal(layer.q.weight, state["model.layers.1.self_attn.q_proj.weight"])
    assert torch.equal(layer.k.weight, state["model.layers.1.self_attn.k_proj.weight"])


def test_rslora_divides_by_the_root_of_the_rank(tmp_path, base) -> None:
    state = tiny.read_tensors(base)
    tensors = factors(state, ("o_proj",))
    folder = write_adapter(tmp_path / "rs", tensors, use_rslora=True)
    found = opened(base, folder, tmp_path / "both").layer(0).o.weight
    want = merged(state, tensors, 16 / 2)["model.layers.0.self_attn.o_proj.weight"]
    assert torch.equal(found, want)


def test_a_pickled_adapter_with_older_names_is_read(tmp_path, base) -> None:
    state = tiny.read_tensors(base)
    tensors = factors(state, ("v_proj",))
    folder = write_adapter(tmp_path / "old", {"x": torch.zeros(1)})
    (folder / "adapter_model.safetensors").unlink()
    older = {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}
    torch.save(older, folder / "adapter_model.bin")
    found = opened(base, folder, tmp_path / "both").layer(0).v.weight
    want = merged(state, tensors, 16 / RANK)["model.layers.0.self_attn.v_proj.weight"]
    assert torch.equal(found, want)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.complex64])
def test_factors_of_other_types_are_refused(tmp_path, base, adapter, dtype) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    tensors = factors(tiny.read_tensors(base), ("v_proj",))
    torch.save(
        {name: value.to(dtype) for name, value in tensors.items()}, adapter / "adapter_model.bin"
    )
    complaint = rf"lora_A.weight of the adapter is {dtype}, expected fp16, bf16, fp32 or fp64; save"
    with pytest.raises(PackageError, match=complaint):
        opened(base, adapter, tmp_path / "both")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_factors_of_the_same_values_give_the_same_weights(tmp_path, base, adapter, dtype):
    expected = opened(base, adapter, tmp_path / "one").layer(0).q.weight
    tensors = factors(tiny.read_tensors(base), ("q_proj", "down_proj"))
    write_adapter(adapter, {name: value.to(dtype) for name, value in tensors.items()})
    assert torch.equal(opened(base, adapter, tmp_path / "two").layer(0).q.weight, expected)


def test_modules_to_save_replace_the_bases(tmp_path, base) -> None:
    head = torch.randn(128, 64)
    name = "base_model.model.lm_head.modules_to_save.default.weight"
    folder = write_adapter(tmp_path / "saved", {name: head}, modules_to_save=["lm_head"])
    checkpoint = opened(base, folder, tmp_path / "both")
    assert torch.equal(checkpoint.head(), head.bfloat16())


def test_the_folder_links_to_the_base_and_its_hash_knows_both(tmp_path, base, adapter) -> None:
    folder = fetch(str(base), tmp_path / "both", FetchOptions(adapter=adapter))
    assert (folder / "model.safetensors").is_symlink()
    assert read_origin(folder, is_quantized=False).provenance.source == "base + tuned"
    first = ContentHasher(tmp_path / "a.json").hash_tree(folder)
    assert fetch(str(base), tmp_path / "both", FetchOptions(adapter=adapter)) == folder
    assert ContentHasher(tmp_path / "b.json").hash_tree(folder) == first
    state = tiny.read_tensors(base)
    write_adapter(adapter, factors(state, ("q_proj", "down_proj"), seed=10))
    fetch(str(base), tmp_path / "both", FetchOptions(adapter=adapter))
    second = ContentHasher(tmp_path / "c.json").hash_tree(folder)
    tiny.write_llama(base, dtype=torch.bfloat16, seed=4)
    assert len({first, second, ContentHasher(tmp_path / "d.json").hash_tree(folder)}) == 3


def test_a_gguf_file_can_be_the_base(tmp_path: Path) -> None:
    model = tiny_gguf.random_model("llama")
    tiny_gguf.write_gguf(tmp_path / "m.gguf", model)
    state = {name: value.half() for name, value in model.state_dict().items()}
    tensors = factors(state, ("k_proj",))
    adapter = write_adapter(tmp_path / "tuned", tensors)
    options = FetchOptions(adapter=adapter)
    folder = fetch(str(tmp_path / "m.gguf"), tmp_path / "out", options)
    assert (tmp_path / "out-base" / "config.json").is_file()
    assert read_origin(folder, is_quantized=False).provenance.source == "m.gguf + tuned"
    want = merged(state, tensors, 16 / RANK)["model.layers.0.self_attn.k_proj.weight"]
    assert torch.equal(Checkpoint.open(folder).layer(0).k.weight, want)


def test_a_tokenizer_beside_the_adapter_takes_the_place_of_the_bases(tmp_path, base, adapter):
    (base / "tokenizer_config.json").write_text('{"eos_token": "w1"}')
    (base / "special_tokens_map.json").write_text("{}")
    folder = adapt(base, adapter, tmp_path / "one", Progress())
    assert (folder / "tokenizer_config.json").read_text() == '{"eos_token": "w1"}'
    tiny.write_tokenizer(adapter)
    (adapter / "tokenizer_config.json").write_text('{"eos_token": "w2"}')
    folder = adapt(base, adapter, tmp_path / "two", Progress())
    assert (folder / "tokenizer_config.json").read_text() == '{"eos_token": "w2"}'
    assert not (folder / "special_tokens_map.json").exists()


def test_the_package_is_named_after_both(tmp_path, base, adapter) -> None:
    assert default_name(str(base), adapter) == "base-tuned"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"peft_type": "LOHA"}, "asks for peft_type 'LOHA', turbojet merges plain LoRA"),
        ({"use_dora": True}, r"asks for DoRA \(use_dora True\)"),
        ({"bias": "all"}, r"asks for trained biases \(bias 'all'\)"),
        ({"fan_in_fan_out": True}, "asks for transposed weights"),
        ({"alpha_pattern": {"q_proj": 3}}, "asks for another alpha for some modules"),
        ({"rank_pattern": {"q_proj": 3}}, "asks for another rank for some modules"),
        (
            {"alora_invocation_tokens": [1, 2]},
            r"asks for activated LoRA \(alora_invocation_tokens \[1, 2\]\)",
        ),
        ({"use_bdlora": {"nblocks": 2}}, r"asks for block-diagonal LoRA \(use_bdlora {'nblocks'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa': the adapter belongs to a ch"),
        ({"r": 0}, r"adapter_config.json says r 0, expected an integer from 1"),
        ({"lora_alpha": "big"}, "adapter_config.json says lora_alpha 'big', expected a positive"),
        ({"r": 8}, r"lora_A.weight of the adapter is torch.bfloat16 \[4, 96\], .* mean \[8, 96\]"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(tmp_path, base, adapter, changes, complaint):
    (adapter / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(PackageError, match=complaint):
        opened(base, adapter, tmp_path / "both")


@pytest.mark.parametrize(
    ("name", "shape", "complaint"),
    [
        ("model.layers.9.mlp.up_proj.lora_A.weight", (4, 64), "has one factor of model.layers.9"),
        ("model.embed_tokens.lora_embedding_A", (4, 128), "lora_embedding_A .* no factor of a lin"),
        ("lm_head.weight", (130, 64), r"lm_head.weight of the adapter is .*\[130, 64\].*\[128, 64"),
        ("model.layers.9.norm.weight", (64,), "changes model.layers.9.norm.weight, which the base"),
        ("score.weight", (2, 64), "changes score.weight, which the base does not have"),
    ],
)
def test_tensors_that_have_no_place_are_refused(tmp_path, base, name, shape, complaint):
    folder = write_adapter(tmp_path / "odd", {f"base_model.model.{name}": torch.zeros(shape)})
    with pytest.raises(PackageError, match=complaint):
        opened(base, folder, tmp_path / "both")


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (
            ("q_proj.lora_A.default.weight", "q_proj.lora_A.weight", "q_proj.lora_B.weight"),
            r"q_proj.lora_A.default.weight and .*q_proj.lora_A.weight, which change the same",
        ),
        (
            ("q_proj.modules_to_save.weight", "q_proj.modules_to_save.default.weight"),
            r"modules_to_save.* and .*modules_to_save.*, which change the same weight",
        ),
        (
            ("q_proj.weight", "q_proj.lora_A.weight", "q_proj.lora_B.weight"),
            r"q_proj.weight and .*q_proj.lora_A.weight, which change the same weight",
        ),
    ],
)
def test_two_tensors_for_one_place_are_refused(tmp_path, base, names, complaint) -> None:
    module = "base_model.model.model.layers.0.self_attn"
    folder = write_adapter(tmp_path / "odd", {f"{module}.{name}": torch.zeros(4) for name in names})
    with pytest.raises(PackageError, match=complaint):
        opened(base, folder, tmp_path / "both")


def test_an_adapter_that_changes_nothing_is_refused(tmp_path, base) -> None:
    folder = write_adapter(tmp_path / "odd", {})
    with pytest.raises(PackageError, match=r"the weights of the adapter .* are empty, save the"):
        opened(base, folder, tmp_path / "both")


def test_names_without_pefts_prefix_are_refused(tmp_path, base) -> None:
    folder = write_adapter(tmp_path / "odd", {"lm_head.weight": torch.zeros(128, 64)})
    with pytest.raises(PackageError, match=r"lm_head.weight of the adapter is no factor"):
        opened(base, folder, tmp_path / "both")


def test_factors_of_what_is_no_linear_are_refused(tmp_path, base) -> None:
    prefix = "base_model.model.model.norm.lora_"
    pair = {f"{prefix}A.weight": torch.zeros(4, 64), f"{prefix}B.weight": torch.zeros(64, 4)}
    folder = write_adapter(tmp_path / "odd", pair)
    with pytest.raises(PackageError, match=r"changes model.norm.weight, which is no linear's"):
        opened(base, folder, tmp_path / "both")


def test_a_quantized_base_is_refused(tmp_path, base, adapter) -> None:
    tensors = tiny.quantize_tensors(tiny.read_tensors(base), 32)
    tiny.write_checkpoint(base, json.loads((base / "config.json").read_text()), tensors)
    with pytest.raises(PackageError, match="which the base does not have in floating point"):
        opened(base, adapter, tmp_path / "both")


class Payload:
    """Runs a command when a careless unpickler meets it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.target}",)


def test_a_pickled_adapter_with_code_is_not_executed(tmp_path, base, adapter) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": Payload(tmp_path / "owned")}, adapter / "adapter_model.bin")
    with pytest.raises(PackageError, match=r"adapter_model\.bin is no plain torch file of tensors"):
        opened(base, adapter, tmp_path / "both")
    assert not (tmp_path / "owned").exists()


def test_an_adapter_whose_weights_are_not_numbers_is_refused(tmp_path, base, adapter) -> None:
    tensors = factors(tiny.read_tensors(base), ("q_proj",))
    name = next(iter(tensors))
    tensors[name][0, 0] = math.nan
    write_adapter(adapter, tensors)
    with pytest.raises(PackageError, match=r"lora_A\.weight of adapter_model.* holds NaN"):
        opened(base, adapter, tmp_path / "both").layer(0)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_an_adapter_that_overflows_the_base_is_named(tmp_path, is_replaced: bool) -> None:
    base = tiny.write_llama(tmp_path / "base", dtype=torch.float16)
    name = "base_model.model.lm_head"
    # Scale 16 / 4, 4 ranks, 8 x 512: the product is 65536.
    tensors = {
        f"{name}.lora_A.weight": torch.full((RANK, 64), 8.0),
        f"{name}.lora_B.weight": torch.full((128, RANK), 512.0),
    }
    if is_replaced:
        tensors = {f"{name}.weight": torch.full((128, 64), 65536.0)}
    folder = write_adapter(tmp_path / "tuned", tensors)
    complaint = r"^the adapter takes lm_head.weight beyond torch.float16, which ends at 65504; name"
    with pytest.raises(PackageError, match=complaint):
        opened(base, folder, tmp_path / "both").head()


def test_what_the_base_holds_is_not_the_adapters_fault(tmp_path, base, adapter) -> None:
    tensors = tiny.read_tensors(base)
    tensors["model.layers.0.self_attn.q_proj.weight"][3, 5] = math.inf
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(PackageError, match=r"q_proj.weight of model.safetensors holds NaN or infi"):
        opened(base, adapter, tmp_path / "both").layer(0)


def test_folders_that_are_no_adapter_are_refused(tmp_path, base, adapter, capsys) -> None:
    with pytest.raises(PackageError, match=r"base has no adapter_config.json, name the folder"):
        adapt(base, base, tmp_path / "both", Progress())
    with pytest.raises(PackageError, match="is an adapter without its base, name the base and"):
        fetch(str(adapter), tmp_path / "both")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(PackageError, match=r"has no adapter_model.safetensors or adapter_model.b"):
        adapt(base, adapter, tmp_path / "both", Progress())
    command = ["fetch", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "both")]
    assert cli.main(command) == 3
    assert "tuned has no adapter_model.safetensors or" in capsys.readouterr().err
    assert not (tmp_path / "both").exists()


def test_an_adapter_folder_that_lost_its_weights_is_refused(tmp_path, base, adapter) -> None:
    folder = adapt(base, adapter, tmp_path / "both", Progress())
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(PackageError, match=r"adapter has no adapter_model.safetensors or"):
        Checkpoint.open(folder)


def test_only_a_folder_of_ours_is_made_again(tmp_path, base, adapter) -> None:
    with pytest.raises(UsageError, match="tuned exists and is no base with an adapter"):
        adapt(base, adapter, adapter, Progress())
    folder = adapt(base, adapter, tmp_path / "both", Progress())
    with pytest.raises(PackageError, match="both has an adapter already, name the base alone"):
        adapt(folder, adapter, tmp_path / "twice", Progress())


def test_a_merged_folder_is_a_checkpoint_like_any_other(tmp_path, base) -> None:
    state = tiny.read_tensors(base)
    tensors = factors(state, ("q_proj",))
    config = json.loads((base / "config.json").read_text())
    folder = tiny.write_checkpoint(tmp_path / "merged", config, merged(state, tensors, 4.0))
    tiny.write_tokenizer(folder)
    # XTuner leaves these beside the weights.
    (folder / "xtuner_config.py").write_text("raise SystemExit('never run')")
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    assert fetch(str(folder), tmp_path / "unused") == folder
    assert Checkpoint.open(folder).model == Checkpoint.open(base).model
