from dataclasses import replace
from pathlib import Path

import pytest
from test_plan import MODEL

from device_runtime.errors import UsageError
from host_tools.build_choices import default_name, default_work_dir, largest_group_size
from host_tools.origin import read_origin


@pytest.mark.parametrize(
    ("sizes", "group_size", "reason"),
    [
        ({}, 128, ""),
        # SmolLM2-135M: 576 = 4.5 x 128 = 9 x 64
        ({"hidden_size": 576}, 64, "128 does not divide hidden_size 576"),
        (
            {"intermediate_size": 4128},
            32,
            "128 does not divide intermediate_size of a rank 4128",
        ),
        (
            {"num_attention_heads": 9, "num_kv_heads": 3, "head_dim": 64},
            64,
            "128 does not divide attention outputs of a rank 576",
        ),
    ],
)
def test_the_largest_group_that_fits_is_chosen_and_explained(sizes, group_size, reason):
    assert largest_group_size(replace(MODEL, **sizes), 1) == (group_size, reason)


def test_ranks_make_groups_smaller():
    # 4096 / 64 = 64 inputs of w2 on each of 64 ranks
    assert largest_group_size(replace(MODEL, intermediate_size=256), 4)[0] == 64


def test_a_model_that_no_group_fits_is_refused():
    with pytest.raises(
        UsageError, match=r"no group size fits this model: 32 does not divide hidden_size 1000; use"
    ):
        largest_group_size(replace(MODEL, hidden_size=1000), 1)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("internlm2-chat-7b-q5_k_m.gguf", "internlm2-chat-7b"),
        ("model-F16.gguf", "model"),
        ("model.IQ3_XXS.gguf", "model"),
        ("qwen2.5-7b.gguf", "qwen2.5-7b"),
    ],
)
def test_a_gguf_lends_its_name_without_the_quantization(tmp_path, file, name):
    (tmp_path / file).write_bytes(b"GGUF")
    assert default_name(str(tmp_path / file)) == name


def test_folders_and_hub_ids_lend_their_last_part(tmp_path, monkeypatch):
    (tmp_path / "my-model").mkdir()
    assert default_name(str(tmp_path / "my-model")) == "my-model"
    monkeypatch.chdir(tmp_path / "my-model")
    assert default_name(".") == "my-model"
    assert default_name("Shanghai_AI_Laboratory/internlm2-chat-1_8b") == "internlm2-chat-1_8b"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("hub/models--Qwen--Qwen2.5-7B-Instruct/snapshots/0a1b2c", "Qwen2.5-7B-Instruct"),
        ("hub/models--gpt2/snapshots/0a1b2c", "gpt2"),
        ("photos/snapshots/0a1b2c", "0a1b2c"),
        ("modelscope/Qwen/Qwen2___5-7B-Instruct", "Qwen2.5-7B-Instruct"),
    ],
)
def test_caches_of_hubs_lend_the_models_name(tmp_path, folder, name):
    (tmp_path / folder).mkdir(parents=True)
    assert default_name(str(tmp_path / folder)) == name
    assert default_name("org/base", tmp_path / folder) == f"base-{name}"
    origin = read_origin(tmp_path / folder, is_quantized=False)
    assert origin.provenance.source == name


def test_the_work_folder_lies_beside_the_archive():
    assert default_work_dir(Path("out/robot.tgz")) == Path("out/robot.work")
    assert default_work_dir(Path("robot")) == Path("robot.work")
