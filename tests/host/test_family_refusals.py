"""Models that turbojet does not run are refused by name: one sentence and exit code 3."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import tiny_checkpoints as tiny
from tiny_tokenizer import write_tokenizer

from device_runtime.errors import PackageError
from host_tools import cli
from host_tools.checkpoint.config_reader import read_family, read_model
from host_tools.checkpoint.families import find_family


def refused(name: str, complaint: str, **changes: object) -> None:
    """The config of a family with changes is refused; None takes a key away."""
    config = {**families.CASES[name].config, **changes}
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(PackageError, match=complaint):
        read_model(config, read_family(config), 0)


@pytest.mark.parametrize("kind", ["yarn", "longrope", "su", "mrope", "proportional"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_rope_scalings_that_are_not_run_are_named(key: str, kind: str) -> None:
    for name in ("llama-3-8b-instruct", "qwen2.5-0.5b-instruct", "internlm2-chat-7b"):
        refused(
            name,
            f"asks for rope scaling '{kind}', turbojet runs default, linear, dynamic, llama3",
            rope_scaling={key: kind, "factor": 4.0, "original_max_position_embeddings": 32768},
        )


@pytest.mark.parametrize(
    "architecture",
    ["MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "InternLM2MoeForCausalLM"],
)
def test_mixtures_of_experts_are_named(architecture: str) -> None:
    with pytest.raises(
        PackageError, match=f"{architecture} is a mixture of experts, turbojet runs"
    ):
        find_family(architecture)


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("baichuan2-7b-chat", {"max_position_embeddings": None}, "Baichuan-13B, whose positions"),
        ("qwen-7b-chat", {"no_bias": False}, r"biases of all linears \(no_bias False\)"),
        ("qwen-7b-chat", {"rotary_pct": 0.25}, r"partial rotary embeddings \(rotary_pct 0.25\)"),
        ("qwen-7b-chat", {"scale_attn_weights": False}, "attention scores that are not scaled"),
        ("qwen-7b-chat", {"visual": {"layers": 48}}, r"asks for pictures \(visual\)"),
        ("qwen-7b-chat", {"intermediate_size": 641}, "641, expected a multiple of 2: it counts g"),
        ("qwen-7b-chat", {"seq_length": None}, "has no seq_length, expected an integer"),
        ("qwen-7b-chat", {"layer_norm_epsilon": -1}, "says layer_norm_epsilon -1, expected a pos"),
        ("internlm3-8b-instruct", {"bias": True}, r"biases in the MLP \(bias\)"),
        ("internlm-chat-7b", {"rotary": {"type": "spiral"}}, "asks for rope scaling 'spiral'"),
        ("llama-3-8b-instruct", {"mlp_bias": True}, r"biases in the MLP \(mlp_bias\)"),
        ("llama-3-8b-instruct", {"partial_rotary_factor": 0.5}, "partial rotary embeddings"),
        (
            "llama-3-8b-instruct",
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5, "rope_type": "default"}}},
            r"rotary embeddings by kind of layer \(rope_parameters\)",
        ),
        ("llama-3-8b-instruct", {"hidden_act": "gelu"}, "hidden_act 'gelu', turbojet runs silu"),
        (
            "qwen3-0.6b",
            {"layer_types": ["full_attention", "linear_attention"]},
            "layers of the kind 'linear_attention', turbojet runs full_attention",
        ),
        ("smollm3-3b", {"no_rope_layers": [1, 0]}, "no_rope_layers with 2 entries, expected 0 or"),
        ("smollm3-3b", {"no_rope_layers": [1, 0, 2, 1, 1]}, "with 5 entries, expected 0 or 1 for"),
        ("smollm3-3b", {"no_rope_layers": "all"}, "says no_rope_layers 'all', expected a list"),
        ("mistral-7b-instruct-v0.1", {"sliding_window": -4}, "sliding_window -4, expected an int"),
    ],
)
def test_what_a_family_does_not_do_is_named(name: str, changes: dict, complaint: str) -> None:
    refused(name, complaint, **changes)


@pytest.mark.parametrize(
    ("name", "kind", "has_logn"),
    [("qwen-7b-chat", "qwen1", True), ("qwen2.5-0.5b-instruct", "none", False)],
)
def test_qwen_1s_keys_count_for_qwen_1_alone(name: str, kind: str, has_logn: bool) -> None:
    config = {**families.CASES[name].config, "use_dynamic_ntk": True, "use_logn_attn": True}
    model = read_model(config, read_family(config), 0)
    assert (model.rope_scaling.kind, model.use_logn_attn) == (kind, has_logn)


def test_windows_count_where_the_family_has_them() -> None:
    def window(name: str, **changes: object) -> int:
        config = {**families.CASES[name].config, **changes}
        return read_model(config, read_family(config), 0).sliding_window

    assert window("mistral-7b-instruct-v0.1") == 48
    assert window("mistral-7b-instruct-v0.3") == 0
    assert window("mistral-7b-instruct-v0.1", sliding_window=4096) == 0  # beyond the context
    assert window("qwen1.5-1.8b-chat") == 0
    assert window("qwen1.5-1.8b-chat", use_sliding_window=True) == 16


def test_layers_without_rope_follow_the_list_or_the_interval() -> None:
    def layers(**changes: object) -> tuple[int, ...]:
        config = {**families.CASES["smollm3-3b"].config, **changes}
        return read_model(config, read_family(config), 0).layers_without_rope

    assert layers() == (3,)
    assert layers(no_rope_layers=[0, 1, 0, 1, 1, 1]) == (0, 2)
    assert layers(no_rope_layers=None, no_rope_layer_interval=2) == (1, 3)
    assert layers(no_rope_layers=None, no_rope_layer_interval=None) == (3,)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_hidden_layers": 1 << 23}, "num_hidden_layers is 8388608, expected 1 to 1024"),
        ({"num_hidden_layers": 1000}, "tensor model.layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 1 << 40}, "says num_hidden_layers 1099511627776, expected an int"),
        ({"hidden_size": 1 << 24}, "hidden_size is 16777216, expected 1 to 1048576"),
        ({"vocab_size": 1 << 24}, "tensor model.embed_tokens.weight is .*means .16777216, 64"),
        ({"num_attention_heads": 1 << 22, "head_dim": 2}, "num_attention_heads is 4194304, exp"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"intermediate_size": 1e30}, "says intermediate_size 1e.30, expected an integer"),
        ({"max_position_embeddings": 10**400}, "says max_position_embeddings 1000.*, expected an"),
        ({"rope_theta": 10**400}, "says rope_theta 1000.*, expected a positive number"),
        ({"rms_norm_eps": float("inf")}, "says rms_norm_eps inf, expected a positive number"),
    ],
)
def test_a_config_that_lies_about_sizes_ends_the_command_with_3(
    tmp_path: Path, capsys: pytest.CaptureFixture, changes: dict, complaint: str
) -> None:
    folder = tiny.write_llama(tmp_path / "lies")
    write_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    command = ["convert", str(folder), "--model-name", "x", "--output", str(tmp_path / "tm")]
    assert cli.main(command) == 3
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert sentence.startswith("turbojet-host: ")
    with pytest.raises(PackageError, match=complaint):
        raise PackageError(sentence)
    assert not (tmp_path / "tm").exists()


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ({"vocab": {"": 0, "a": 1}, "merges": [["a", ""], ["", "a"]]}, "makes 'a' of itself"),
        ({"vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}, "of which one or the whole"),
        ({"vocab": {"a": 0, "\u00e9": 1}, "merges": [["a", "\u00e9"]],
          "continuing_subword_prefix": "x"}, "continuing_subword_prefix 'x', which is not"),
    ],
    ids=["in a circle", "into no token", "cut inside a character"],
)  # fmt: skip
def test_a_tokenizer_of_hostile_merges_ends_the_command_with_3(
    tmp_path: Path, capsys: pytest.CaptureFixture, model: dict, complaint: str
) -> None:
    folder = tiny.write_llama(tmp_path / "hostile")
    definition = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", **model}}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    command = ["convert", str(folder), "--model-name", "x", "--output", str(tmp_path / "tm")]
    assert cli.main(command) == 3
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert complaint in sentence
    assert not (tmp_path / "tm").exists()
