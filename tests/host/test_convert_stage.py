"""convert as a stage: config.ini, manifest, what is kept, what is refused."""

import json
from dataclasses import replace

import pytest
import tiny_sentencepiece
import torch
from test_convert_bytes import GQA_64, int4_tensors
from tiny_checkpoints import add_biases, llama_tensors, write_checkpoint
from tiny_tokenizer import CHATML, VOCAB_SIZE, write_tokenizer

from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format.manifest import (
    Calibration,
    Manifest,
    Provenance,
    SamplingDefaults,
    TemplateChoice,
    TokenizerFacts,
    read_manifest,
)
from device_runtime.package_format.model_config import RopeScaling
from device_runtime.package_format.package import open_package
from host_tools.checkpoint import Checkpoint
from host_tools.content_hash import ContentHasher
from host_tools.convert import convert
from host_tools.origin import Origin, read_origin, write_origin
from host_tools.package_options import ConfigValues, ConvertOptions
from host_tools.progress import Progress
from host_tools.stage import exclusive
from host_tools.turbomind_tensors import layer_tensors

CONFIG_INI = """\
[llama]
model_name = tiny
tensor_para_size = 1
head_num = 8
kv_head_num = 4
vocab_size = 301
num_layer = 2
inter_size = 256
norm_eps = 1e-05
attn_bias = 0
start_id = 0
end_id = 2
session_len = 264
weight_type = int4
rotary_embedding = 64
rope_theta = 10000.0
size_per_head = 64
group_size = 64
max_batch_size = 64
max_context_token_num = 1
step_length = 1
cache_max_entry_count = 0.8
cache_block_seq_len = 128
cache_chunk_size = -1
num_tokens_per_iter = 0
max_prefill_iters = 1
extra_tokens_per_iter = 0
use_context_fmha = 1
quant_policy = 0
max_position_embeddings = 256
rope_scaling_factor = 0.0
use_logn_attn = 0

"""


class Notes(Progress):
    """Keeps what a stage says."""

    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@pytest.fixture(scope="module")
def awq_tensors():
    return int4_tensors(GQA_64, 64)


@pytest.fixture
def awq_dir(tmp_path, awq_tensors):
    return write_source(tmp_path / "awq", GQA_64.config(), awq_tensors)


def write_source(folder, config, tensors, **tokenizer_config):
    write_checkpoint(folder, config, tensors)
    write_tokenizer(folder, **tokenizer_config)
    return folder


def run(source, output, progress=None, **options):
    values = {"model_name": "tiny", **options}
    return convert(source, output, ConvertOptions(**values), progress or Progress())


def config_ini(workspace):
    return workspace / "triton_models" / "weights" / "config.ini"


def test_config_ini_holds_what_v0_2_3_writes(awq_dir, tmp_path):
    assert config_ini(run(awq_dir, tmp_path / "tm")).read_text() == CONFIG_INI


def test_hand_edits_are_options(awq_dir, tmp_path):
    values = ConfigValues(8, 0.25, 64, 1, 1000, 3)
    found = config_ini(run(awq_dir, tmp_path / "tm", config=values)).read_text()
    expected = CONFIG_INI
    for old, new in (
        ("quant_policy = 0", "quant_policy = 8"),
        ("cache_max_entry_count = 0.8", "cache_max_entry_count = 0.25"),
        ("cache_block_seq_len = 128", "cache_block_seq_len = 64"),
        ("cache_chunk_size = -1", "cache_chunk_size = 1"),
        ("session_len = 264", "session_len = 1000"),
        ("max_batch_size = 64", "max_batch_size = 3"),
    ):
        expected = expected.replace(old, new)
    assert found == expected


def test_a_name_of_lmdeploy_brings_its_session_len(awq_dir, tmp_path):
    run(awq_dir, tmp_path / "tm", model_name="internlm2-chat-1_8b")
    assert "session_len = 32776\n" in config_ini(tmp_path / "tm").read_text()


def test_the_workspace_opens_with_every_fact_of_the_manifest(awq_dir, tmp_path):
    package = open_package(run(awq_dir, tmp_path / "tm"))
    manifest = package.manifest
    assert not manifest.is_sealed
    assert manifest.name == "tiny"
    assert (manifest.quantization.method, manifest.quantization.w_bits) == ("awq", 4)
    assert manifest.template == TemplateChoice("jinja", "tokenizer_config.json", CHATML)
    assert manifest.tokenizer == TokenizerFacts(None, False, (2, 0))
    assert manifest.sampling == SamplingDefaults()
    assert manifest.provenance.source == "awq"
    assert manifest.provenance.source_kind == "folder"
    assert [tool.name for tool in manifest.provenance.tools] == ["turbojet", "torch", "numpy"]
    assert sorted(path.name for path in package.tokenizer_dir.iterdir()) == [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_what_config_ini_has_no_room_for_is_in_the_manifest(tmp_path):
    config = GQA_64.config(
        architectures=["Qwen3ForCausalLM"],
        tie_word_embeddings=True,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    tensors = llama_tensors(config)
    for layer in range(2):
        for name in ("q_norm", "k_norm"):
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = torch.ones(64).half()
    source = write_source(tmp_path / "source", config, tensors)
    model = open_package(run(source, tmp_path / "tm")).model
    assert model.tie_word_embeddings
    assert model.has_qk_norm
    assert model.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


def test_the_family_template_stands_in_for_a_missing_one(tmp_path, awq_tensors):
    source = write_source(tmp_path / "awq", GQA_64.config(), awq_tensors, chat_template=None)
    manifest = open_package(run(source, tmp_path / "tm", model_name="internlm2-chat-7b")).manifest
    assert manifest.template == TemplateChoice("builtin", "internlm2-chat")
    # <|im_end|> (2) stays in the history as the template's stop word; <|action_end|> is no token
    assert manifest.tokenizer == TokenizerFacts(None, False, (0,), (2,))


def test_the_source_tells_the_family_when_the_name_does_not(tmp_path, awq_tensors):
    source = write_source(tmp_path / "awq", GQA_64.config(), awq_tensors, chat_template=None)
    provenance = Provenance("Shanghai_AI_Laboratory/internlm2-chat-7b", "modelscope")
    write_origin(source, Origin(provenance, "rtn"))
    manifest = open_package(run(source, tmp_path / "tm", model_name="robot")).manifest
    assert manifest.template == TemplateChoice("builtin", "internlm2-chat")
    assert manifest.quantization.method == "rtn"


def test_plain_text_is_said_with_the_template_to_name(tmp_path, awq_tensors):
    config = GQA_64.config(architectures=["Qwen2ForCausalLM"])
    tensors = llama_tensors(config)
    add_biases(tensors, ("q_proj", "k_proj", "v_proj"))
    source = write_source(tmp_path / "float", config, tensors, chat_template=None)
    notes = Notes()
    manifest = open_package(run(source, tmp_path / "tm", notes, model_name="robot")).manifest
    assert manifest.template == TemplateChoice("builtin", "base")
    assert notes.lines == [
        "convert: no chat template is known for robot, text goes in as it is; name one for a chat "
        "model, such as --template qwen2d5"
    ]
    notes.lines.clear()
    run(source, tmp_path / "other", notes, model_name="robot", template="base")
    assert notes.lines == []


def test_a_template_can_be_asked_for(awq_dir, tmp_path):
    run(awq_dir, tmp_path / "tm", template="llama2")
    assert read_manifest(tmp_path / "tm").template == TemplateChoice("builtin", "llama2")
    with pytest.raises(UsageError, match="there is no chat template 'llama9'"):
        run(awq_dir, tmp_path / "tm", template="llama9")


def test_bos_and_sampling_come_from_the_checkpoint(tmp_path, awq_tensors):
    source = write_source(
        tmp_path / "awq", GQA_64.config(), awq_tensors,
        bos_token={"content": "<|im_start|>"}, add_bos_token=True,
    )  # fmt: skip
    (source / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "top_k": 20, "eos_token_id": 0})
    )
    manifest = open_package(run(source, tmp_path / "tm")).manifest
    assert manifest.tokenizer == TokenizerFacts(1, True, (2, 0))
    assert manifest.sampling == SamplingDefaults(temperature=0.6, top_k=20)
    assert "start_id = 1\nend_id = 2\n" in config_ini(tmp_path / "tm").read_text()


def test_provenance_travels_from_the_checkpoint_into_the_manifest(awq_dir, tmp_path):
    calibration = Calibration("c4", 8, 512, 0)
    origin = Origin(Provenance("org/model", "modelscope", "v1"), "none").quantized(
        "awq", calibration
    )
    write_origin(awq_dir, origin)
    assert read_origin(awq_dir, is_quantized=True) == origin
    provenance = open_package(run(awq_dir, tmp_path / "tm")).manifest.provenance
    # it does not know the hash of what it was made from, so its own stands in
    own = ContentHasher(tmp_path / "hashes.json").hash_tree(awq_dir)
    assert replace(provenance, tools=()) == Provenance(
        "org/model", "modelscope", "v1", own, calibration
    )
    origin = replace(origin, provenance=replace(origin.provenance, source_sha256="ab" * 32))
    write_origin(awq_dir, origin)
    provenance = open_package(run(awq_dir, tmp_path / "tm")).manifest.provenance
    assert provenance.source_sha256 == "ab" * 32


def test_finished_work_is_kept_and_anything_else_is_done_again(awq_dir, tmp_path):
    notes = Notes()
    output = run(awq_dir, tmp_path / "tm", notes)
    tensor = output / "triton_models" / "weights" / "norm.weight"
    made_ns = tensor.stat().st_mtime_ns
    run(awq_dir, output, notes)
    assert tensor.stat().st_mtime_ns == made_ns
    assert notes.lines == [f"convert: {output} is up to date"]
    run(awq_dir, output, notes, config=ConfigValues(quant_policy=4))
    assert tensor.stat().st_mtime_ns > made_ns
    assert len(notes.lines) == 1


def test_a_damaged_workspace_is_made_again(awq_dir, tmp_path):
    output = run(awq_dir, tmp_path / "tm")
    tensor = output / "triton_models" / "weights" / "norm.weight"
    good = tensor.read_bytes()
    tensor.write_bytes(bytes(len(good)))
    run(awq_dir, output)
    assert tensor.read_bytes() == good
    config_ini(output).unlink()
    run(awq_dir, output)
    assert config_ini(output).read_text() == CONFIG_INI


def test_config_ini_edited_by_hand_is_kept(awq_dir, tmp_path):
    output = run(awq_dir, tmp_path / "tm")
    edited = CONFIG_INI.replace("quant_policy = 0", "quant_policy = 8")
    config_ini(output).write_text(edited)
    run(awq_dir, output)
    assert config_ini(output).read_text() == edited


def test_the_same_input_gives_the_same_bytes(awq_dir, tmp_path):
    first, second = run(awq_dir, tmp_path / "one"), run(awq_dir, tmp_path / "two")
    for path in sorted(first.rglob("*")):
        if path.is_file() and ".turbojet" not in path.parts:
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path


def test_leftovers_of_a_killed_run_are_swept_away(awq_dir, tmp_path):
    for name in (".tm.part", ".tm.old"):
        (tmp_path / name / "triton_models" / "weights").mkdir(parents=True)
        (tmp_path / name / "triton_models" / "weights" / "junk").write_text("junk")
    run(awq_dir, tmp_path / "tm")
    assert {path.name for path in tmp_path.iterdir()} == {"awq", "tm"}
    assert not list((tmp_path / "tm").rglob("junk"))


def test_two_converts_into_one_folder_do_not_mix(awq_dir, tmp_path):
    with (
        exclusive(tmp_path / ".tm.part"),
        pytest.raises(UsageError, match=r"another turbojet-host is at work in .*\.tm\.part"),
    ):
        run(awq_dir, tmp_path / "tm")
    run(awq_dir, tmp_path / "tm")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_workspace_is_not_replaced(awq_dir, tmp_path, kind):
    output = tmp_path / "precious"
    if kind == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="precious exists and is not a workspace of ours"):
        run(awq_dir, output)
    assert output.exists()


def test_a_tree_of_lmdeploys_own_is_not_replaced(awq_dir, tmp_path):
    output = tmp_path / "workspace"
    (output / "triton_models" / "weights").mkdir(parents=True)
    (output / "model_repository").mkdir()
    (output / "service_docker_up.sh").write_text("mine")
    with pytest.raises(UsageError, match="workspace exists and is not a workspace of ours"):
        run(awq_dir, output)
    assert (output / "service_docker_up.sh").read_text() == "mine"


def test_an_output_behind_a_link_lands_where_the_link_leads(awq_dir, tmp_path):
    (tmp_path / "bigdisk").mkdir()
    link = tmp_path / "tm"
    link.symlink_to("bigdisk")
    (tmp_path / ".tm.old").symlink_to("bigdisk")
    for session_len in (64, 128):
        run(awq_dir, link, config=ConfigValues(session_len=session_len))
        assert link.is_symlink()
        assert open_package(tmp_path / "bigdisk").config.session_len == session_len


def test_a_failed_run_leaves_the_old_workspace(awq_dir, tmp_path):
    output = run(awq_dir, tmp_path / "tm")
    (awq_dir / "tokenizer.json").write_text("{}")
    with pytest.raises(PackageError, match=r"tokenizer\.json is not a tokenizer: it has no model"):
        run(awq_dir, output)
    assert open_package(output).manifest.name == "tiny"


def test_a_group_size_that_is_not_the_checkpoints_is_refused(awq_dir, tmp_path):
    run(awq_dir, tmp_path / "tm", group_size=64)
    with pytest.raises(UsageError, match=r"group-size is 128, .*awq has group size 64"):
        run(awq_dir, tmp_path / "tm", group_size=128)
    source = write_source(tmp_path / "float", GQA_64.config(), llama_tensors(GQA_64.config()))
    with pytest.raises(UsageError, match=r"group-size is 128, .*float has float weights"):
        run(source, tmp_path / "tm", group_size=128)


def test_ranks_that_do_not_divide_the_heads_are_refused(awq_dir, tmp_path):
    refused = r"tp 8 does not fit .*awq: num_kv_heads 4 is not a multiple of tensor_para_size 8; ch"
    with pytest.raises(UsageError, match=refused):
        run(awq_dir, tmp_path / "tm", tp=8)


def test_a_value_beyond_fp16_is_refused_by_name(tmp_path):
    tensors = llama_tensors(GQA_64.config(), dtype=torch.float32)
    tensors["model.norm.weight"][3] = 70000.0
    source = write_source(tmp_path / "wide", GQA_64.config(), tensors)
    with pytest.raises(PackageError, match=r"norm\.weight holds 70000, fp16 ends at 65504"):
        run(source, tmp_path / "tm")


def test_a_value_beyond_bf16_is_refused_by_name(tmp_path):
    config = GQA_64.config(torch_dtype="bfloat16")
    tensors = llama_tensors(config, dtype=torch.float32)
    # bf16 has 8 bits: it ends at (2 - 2**-7) * 2**127, and what is nearer to 2**128 is infinity.
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 3.4e38
    source = write_source(tmp_path / "wide", config, tensors)
    with pytest.raises(PackageError, match=r"layers.1 holds 3.4e\+38, bf16 ends at 3.38953e\+38"):
        run(source, tmp_path / "tm")


def test_a_float_linear_in_the_place_of_codes_is_refused(tmp_path):
    source = write_source(tmp_path / "float", GQA_64.config(), llama_tensors(GQA_64.config()))
    checkpoint = Checkpoint.open(source)
    model = replace(checkpoint.model, weight_type="int4", group_size=64)
    with pytest.raises(PackageError, match=r"layers\.1 has a floating-point linear where the pack"):
        list(layer_tensors(checkpoint.layer(1), model, 1))


def test_a_missing_tokenizer_says_how_to_get_one(awq_dir, tmp_path):
    (awq_dir / "tokenizer.json").unlink()
    with pytest.raises(PackageError, match=r"has no tokenizer\.json, save the checkpoint with a"):
        run(awq_dir, tmp_path / "tm")


def test_a_sentencepiece_model_becomes_a_tokenizer_json(tmp_path, awq_tensors):
    write_checkpoint(tmp_path / "awq", GQA_64.config(), awq_tensors)
    source = tiny_sentencepiece.write_model(tmp_path / "awq")
    notes = Notes()
    package = open_package(run(source, tmp_path / "tm", notes, model_name="internlm2-chat-1_8b"))
    assert package.manifest.tokenizer == TokenizerFacts(1, True, (2,), (276,))
    assert sorted(path.name for path in package.tokenizer_dir.iterdir()) == [
        "tokenizer.json",
        "tokenizer.model",
    ]
    assert notes.lines == [
        "convert: tokenizer.model became tokenizer.json, equal to sentencepiece on 21000 strings"
    ]


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    config = GQA_64.config(vocab_size=200)
    source = write_source(tmp_path / "small", config, llama_tensors(config))
    # 3 special tokens and 256 bytes: the last id is 258
    with pytest.raises(PackageError, match=r"has the token id 258, the embedding has 200 rows"):
        run(source, tmp_path / "tm")
    assert VOCAB_SIZE > 258


@pytest.mark.parametrize("eos_token", [None, "\ud800"])
def test_a_model_without_an_end_is_refused(tmp_path, awq_tensors, eos_token):
    source = write_source(tmp_path / "awq", GQA_64.config(), awq_tensors, eos_token=eos_token)
    (source / "generation_config.json").unlink()
    with pytest.raises(PackageError, match=r"names no eos token in tokenizer_config\.json"):
        run(source, tmp_path / "tm")


@pytest.mark.parametrize("end", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
def test_older_checkpoints_name_their_end_in_a_file_of_its_own(tmp_path, awq_tensors, end):
    source = write_source(tmp_path / "awq", GQA_64.config(), awq_tensors, eos_token=None)
    (source / "generation_config.json").unlink()
    (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": end}))
    assert open_package(run(source, tmp_path / "tm")).manifest.tokenizer.eos_ids == (2,)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (
            {"top_p": -1},
            r"generation_config.json in .*: top_p is -1\.0, expected above 0, at most 1",
        ),
        ({"top_p": 1.5}, "top_p is 1.5, expected above 0, at most 1"),
        ({"top_p": "high"}, "says top_p high, expected a number"),
        ({"top_p": True}, "says top_p True, expected a number"),
        ({"top_k": -2}, "top_k is -2, expected 0 or more"),
        ({"top_k": 40.5}, "says top_k 40.5, expected a whole number"),
        ({"temperature": 10**400}, "says temperature 1000.*, expected a number"),
        ({"min_p": float("nan")}, "says min_p nan, expected a number"),
        ({"min_p": 1.0}, "min_p is 1.0, expected 0 to below 1"),
    ],
)
def test_impossible_sampling_defaults_are_refused(awq_dir, tmp_path, asked, complaint):
    (awq_dir / "generation_config.json").write_text(json.dumps(asked))
    with pytest.raises(PackageError, match=complaint):
        run(awq_dir, tmp_path / "tm")


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ({"top_k": -1, "top_p": 1.0}, SamplingDefaults(top_k=0, top_p=1.0)),  # vLLM
        ({"top_k": 0, "top_p": 1}, SamplingDefaults(top_k=0, top_p=1.0)),  # transformers
        ({"top_k": 50.0}, SamplingDefaults(top_k=50)),
        (
            {"do_sample": False, "temperature": 0.7, "top_k": 20},
            SamplingDefaults(temperature=0.0, top_k=20),
        ),
        ({"do_sample": True, "temperature": 0.7}, SamplingDefaults(temperature=0.7)),
        (
            dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "repetition_penalty")),
            SamplingDefaults(1.0, 0, 1.0, 0.0, 1.0),
        ),
        ({}, SamplingDefaults()),
    ],
)
def test_what_is_off_elsewhere_is_off_here(awq_dir, tmp_path, asked, meant):
    (awq_dir / "generation_config.json").write_text(json.dumps(asked))
    assert open_package(run(awq_dir, tmp_path / "tm")).manifest.sampling == meant


def test_a_damaged_origin_is_named(awq_dir, tmp_path):
    (awq_dir / ".turbojet").mkdir()
    (awq_dir / ".turbojet" / "origin.json").write_text("{")
    with pytest.raises(PackageError, match=r"origin\.json is damaged, remove it or fetch again"):
        run(awq_dir, tmp_path / "tm")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model_name": ""}, "model-name: package name '' is not 1 to 96"),
        ({"model_name": "a/b"}, "model-name: package name 'a/b' is not"),
        ({"tp": 0}, "tp is 0, expected at least 1"),
        ({"tp": 3}, "tp is 3, expected a power of two"),
        ({"group_size": 48}, "group-size is 48, choose 128, 64 or 32"),
    ],
)
def test_options_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        ConvertOptions(**{"model_name": "tiny", **options})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"quant_policy": 3}, "quant-policy is 3, choose 0"),
        ({"cache_max_entry_count": 0.0}, "cache-max-entry-count is 0, expected a share"),
        ({"cache_block_seq_len": 32}, "cache-block-seq-len is 32, expected a multiple of 64"),
        ({"cache_block_seq_len": 96}, "cache-block-seq-len is 96, expected a multiple of 64"),
        ({"cache_chunk_size": -2}, "cache-chunk-size is -2, expected -1"),
        ({"session_len": 0}, "session-len is 0, expected at least 1"),
        ({"max_batch_size": 0}, "max-batch-size is 0, expected at least 1"),
    ],
)
def test_values_of_config_ini_that_cannot_be_are_refused(values, sentence):
    with pytest.raises(UsageError, match=sentence):
        ConfigValues(**values)


def test_the_manifest_is_read_back_as_it_was_written(awq_dir, tmp_path):
    output = run(awq_dir, tmp_path / "tm")
    text = (output / "manifest.json").read_bytes()
    assert Manifest.from_json(text).to_json() == text
