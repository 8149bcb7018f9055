"""A workspace for LMDeploy: its whole tree, what runs in its server, what it cannot run."""

from __future__ import annotations

import configparser
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_sentencepiece
from test_convert_bytes import GQA_128, Shape, int4_tensors
from tiny_checkpoints import llama_tensors, write_checkpoint
from tiny_tokenizer import write_tokenizer
from tokenizers import Tokenizer

from device_runtime.engine.engine import Engine
from device_runtime.engine.options import EngineOptions
from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format.model_config import RopeScaling
from device_runtime.package_format.package import open_package
from host_tools import cli
from host_tools.checkpoint import Checkpoint
from host_tools.convert import convert
from host_tools.lmdeploy import tree
from host_tools.lmdeploy.limits import MODEL_NAMES, check_model_name, check_runs
from host_tools.lmdeploy.tree import copy_settings, plain_merges
from host_tools.package_options import ConvertOptions
from host_tools.progress import Progress

# The smallest that LMDeploy's kernels have: heads of 128, heads x 128 = hidden, groups of 128.
SHAPE = Shape(
    head_dim=128, num_heads=4, num_kv_heads=4, hidden_size=512, intermediate_size=512,
    num_hidden_layers=1,
)  # fmt: skip
OPTIONS = ConvertOptions("internlm2-chat-7b", engine="lmdeploy")


def write_source(folder: Path, shape: Shape = SHAPE, **config: object) -> Path:
    """A float checkpoint with a tokenizer, settings and code of its own."""
    stated = shape.config(**config)
    write_checkpoint(folder, stated, llama_tensors(stated))
    write_tokenizer(folder)
    (folder / "added_tokens.json").write_text("{}")
    (folder / "tokenization_tiny.py").write_text("raise SystemExit('never run here')")
    (folder / "notes.txt").write_text("not copied")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("lmdeploy") / "source")


@pytest.fixture(scope="module")
def workspace(source: Path) -> Path:
    return convert(source, source.parent / "workspace", OPTIONS, Progress())


def entries(root: Path) -> dict[str, str]:
    """Path -> target of a link, or "file"; weights and our records are left out."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in [*files, *(d for d in folders if os.path.islink(os.path.join(folder, d)))]:
            path = os.path.join(folder, name)
            is_link = os.path.islink(path)
            found[os.path.relpath(path, root)] = os.readlink(path) if is_link else "file"
    skipped = (".turbojet/", "triton_models/weights/layers.")
    return {path: kind for path, kind in found.items() if not path.startswith(skipped)}


def test_the_tree_is_that_of_the_specification(workspace: Path) -> None:
    assert entries(workspace) == {
        "manifest.json": "file",
        "service_docker_up.sh": "file",
        "model_repository/turbomind": "../triton_models/interactive",
        "model_repository/preprocessing": "../triton_models/preprocessing",
        "model_repository/postprocessing": "../triton_models/postprocessing",
        "triton_models/interactive/config.pbtxt": "file",
        "triton_models/interactive/1/placeholder": "file",
        "triton_models/interactive/1/weights": "../../weights",
        "triton_models/preprocessing/config.pbtxt": "file",
        "triton_models/preprocessing/1/model.py": "file",
        "triton_models/preprocessing/1/tokenizer": "../../tokenizer",
        "triton_models/postprocessing/config.pbtxt": "file",
        "triton_models/postprocessing/1/model.py": "file",
        "triton_models/postprocessing/1/tokenizer": "../../tokenizer",
        "triton_models/tokenizer/placeholder": "file",
        "triton_models/tokenizer/tokenizer.py": "file",
        "triton_models/tokenizer/tokenizer.json": "file",
        "triton_models/tokenizer/tokenizer_config.json": "file",
        "triton_models/tokenizer/generation_config.json": "file",
        "triton_models/tokenizer/added_tokens.json": "file",
        "triton_models/tokenizer/config.json": "file",
        "triton_models/tokenizer/tokenization_tiny.py": "file",
        "triton_models/weights/config.ini": "file",
        "triton_models/weights/tok_embeddings.weight": "file",
        "triton_models/weights/norm.weight": "file",
        "triton_models/weights/output.weight": "file",
    }
    for place in ("interactive/1", "tokenizer"):
        assert (workspace / "triton_models" / place / "placeholder").read_bytes() == b""
    weights = workspace / "model_repository" / "turbomind" / "1" / "weights"
    assert (weights / "config.ini").is_file()


def test_it_is_the_same_workspace_otherwise_and_runs_here(source: Path, workspace: Path) -> None:
    plain = convert(
        source, source.parent / "plain", replace(OPTIONS, engine="turbojet"), Progress()
    )
    for path in (plain / "triton_models" / "weights").iterdir():
        other = workspace / "triton_models" / "weights" / path.name
        expected = path.read_bytes()
        if path.name == "config.ini":
            expected = expected[:-1] + b"model_arch = LlamaForCausalLM\n\n"
        assert other.read_bytes() == expected, path.name
    logits = []
    for root in (plain, workspace):
        with Engine.open(root, EngineOptions(backend="reference")) as engine:
            logits.append(engine.logits([3, 4, 5]))
    assert np.array_equal(*logits)


def test_a_second_convert_keeps_it_and_mends_a_broken_link(source: Path, workspace: Path) -> None:
    class Notes(Progress):
        seen: list[str] = []  # noqa: RUF012

        def note(self, text: str) -> None:
            self.seen.append(text)

    convert(source, workspace, OPTIONS, Notes())
    assert any("is up to date" in text for text in Notes.seen)
    link = workspace / "triton_models" / "interactive" / "1" / "weights"
    link.unlink()
    before = entries(workspace)
    convert(source, workspace, OPTIONS, Progress())
    assert entries(workspace) == {
        **before, "triton_models/interactive/1/weights": "../../weights",
    }  # fmt: skip


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_four_bit_weights_for_every_number_of_gpus(tmp_path: Path, tp: int) -> None:
    source = write_checkpoint(tmp_path / "awq", SHAPE.config(), int4_tensors(SHAPE, 128))
    write_tokenizer(source)
    output = convert(source, tmp_path / "tm", replace(OPTIONS, tp=tp), Progress())
    assert open_package(output).model.tensor_para_size == tp
    pbtxt = (output / "triton_models/interactive/config.pbtxt").read_text()
    assert f'key: "tensor_para_size"\n  value: {{ string_value: "{tp}" }}' in pbtxt
    assert 'key: "model_name"\n  value: { string_value: "internlm2-chat-7b" }' in pbtxt
    config = configparser.ConfigParser()
    config.read(output / "triton_models/weights/config.ini")
    assert config["llama"]["tensor_para_size"] == str(tp)
    # What the script asks of docker, said by a docker that only says it.
    fake = tmp_path / "bin" / "docker"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{fake.parent}:{os.environ['PATH']}"}
    asked = subprocess.run(
        [output / "service_docker_up.sh"], env=environment, capture_output=True, text=True,
        check=True,
    ).stdout.splitlines()  # fmt: skip
    devices = ",".join(str(device) for device in range(tp))
    assert asked[asked.index("--gpus") + 1] == f'"device={devices}"'
    assert asked[asked.index("-v") + 1] == f"{output}:/workspace/models"
    assert asked[asked.index("tritonserver") - 1] == "openmmlab/lmdeploy:v0.2.3"


def test_the_script_takes_a_backend_of_one_s_own_and_nothing_else(workspace: Path) -> None:
    script = workspace / "service_docker_up.sh"
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
    shown = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert "--lib-dir DIR" in shown.stdout
    assert subprocess.run([script, "--lib"], capture_output=True, check=False).returncode == 2


def test_a_tied_head_is_written_because_lmdeploy_knows_none(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", tie_word_embeddings=True)
    output = convert(source, tmp_path / "tm", OPTIONS, Progress())
    weights = output / "triton_models" / "weights"
    assert (weights / "output.weight").read_bytes() == (
        weights / "tok_embeddings.weight"
    ).read_bytes()


# ------------------------------------------------------------------------------------------------
# The server's own two models, run with a server that is not there.


class Tensor:
    def __init__(self, name: str, values: np.ndarray) -> None:
        self.name, self._values = name, values

    def as_numpy(self) -> np.ndarray:
        return self._values


def triton_model(root: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    """Load a model as the server does: model.py in a package, its folder the version's."""
    stub = types.ModuleType("triton_python_backend_utils")
    stub.Tensor = Tensor
    stub.InferenceResponse = lambda output_tensors: {t.name: t for t in output_tensors}
    stub.get_input_tensor_by_name = lambda request, key: request.get(key)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stub)
    folder = root / "model_repository" / name / "1"
    package = types.ModuleType(f"triton_{name}")
    package.__path__ = [str(folder)]
    for key in [key for key in sys.modules if key.startswith(package.__name__)]:
        monkeypatch.delitem(sys.modules, key)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    spec = importlib.util.spec_from_file_location(f"{package.__name__}.model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    text = (folder.parent / "config.pbtxt").read_text()
    found = re.findall(r'key: "(\w+)"\n  value: \{ string_value: "([^"]*)" \}', text)
    parameters = {key: {"string_value": value} for key, value in found}
    model.initialize({"model_config": json.dumps({"parameters": parameters})})
    return model


def test_the_server_encodes_and_decodes_as_the_device_does(workspace: Path, monkeypatch) -> None:
    model = triton_model(workspace, "preprocessing", monkeypatch)
    texts = ["<|im_start|>user\nhi", "a longer text, 你好", "<EOS>", "<BOS>"]
    query = Tensor("QUERY", np.array([[text.encode()] for text in texts], np.object_))
    (answer,) = model.execute([{"QUERY": query}])
    ids, lengths = answer["INPUT_ID"].as_numpy(), answer["REQUEST_INPUT_LEN"].as_numpy()
    assert (ids.dtype, lengths.dtype) == (np.uint32, np.uint32)
    tokenizer = Tokenizer.from_file(str(workspace / "triton_models/tokenizer/tokenizer.json"))
    for row, text in enumerate(texts[:2]):
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids[row, : lengths[row, 0]].tolist() == expected
    # end_id of config.ini; this tokenizer has no bos.
    assert [ids[2, 0], ids[3, 0]] == [2, 2**32 - 1]
    assert lengths[2:].tolist() == [[1], [1]]

    after = triton_model(workspace, "postprocessing", monkeypatch)
    batch = Tensor("TOKENS_BATCH", ids[None, :2])
    many = Tensor("sequence_length", lengths[:2].T)
    shown, hidden = (Tensor("skip_special_tokens", np.array([[flag, flag]])) for flag in (0, 1))
    requests = [
        {"TOKENS_BATCH": batch, "sequence_length": many, "skip_special_tokens": shown},
        {"TOKENS_BATCH": batch, "sequence_length": many, "skip_special_tokens": hidden},
        {"TOKENS_BATCH": batch, "sequence_length": many},
    ]
    outputs = [answer["OUTPUT"].as_numpy().tolist() for answer in after.execute(requests)]
    hidden_text = [b"user\nhi", texts[1].encode()]
    assert outputs == [[text.encode() for text in texts[:2]], hidden_text, hidden_text]
    model.finalize()
    after.finalize()


def test_a_text_starts_with_bos_where_the_model_has_one(tmp_path: Path, monkeypatch) -> None:
    source = write_checkpoint(tmp_path / "source", SHAPE.config(), llama_tensors(SHAPE.config()))
    write_tokenizer(source, bos_token="<|endoftext|>", add_bos_token=True)
    output = convert(source, tmp_path / "tm", OPTIONS, Progress())
    model = triton_model(output, "preprocessing", monkeypatch)
    query = Tensor("QUERY", np.array([[b"a"], [b"<BOS>"]], np.object_))
    (answer,) = model.execute([{"QUERY": query}])
    ids = answer["INPUT_ID"].as_numpy()
    assert ids[0, 0] == 0
    assert answer["REQUEST_INPUT_LEN"].as_numpy().tolist() == [[2], [1]]
    assert ids[1, 0] == 0


# ------------------------------------------------------------------------------------------------
# The tokenizer's files.


def test_merges_are_written_as_older_libraries_read_them(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    path.write_text(json.dumps({"version": "1.0", "model": model}))
    plain_merges(path)
    assert json.loads(path.read_text())["model"]["merges"] == ["a b"]
    assert Tokenizer.from_file(str(path)).encode("ab").ids == [2]
    model["merges"] = [["a", " b"]]
    text = json.dumps({"version": "1.0", "model": model})
    path.write_text(text)
    plain_merges(path)
    assert path.read_text() == text
    path.write_text("[]")
    with pytest.raises(PackageError, match=r"tokenizer.json is no tokenizer, fetch the check"):
        plain_merges(path)


def test_files_of_the_package_are_not_replaced_by_the_checkpoint_s(tmp_path: Path) -> None:
    for name, text in (("from", "theirs"), ("to", "ours")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.json").write_text(text)
    (tmp_path / "from" / "b.py").write_text("x")
    (tmp_path / "from" / "c.txt").write_text("x")
    (tmp_path / "from" / "__init__.py").write_text("raise SystemExit('run by the server')")
    copied = copy_settings(tmp_path / "from", tmp_path / "to")
    assert [path.name for path in copied] == ["b.py"]
    assert (tmp_path / "to" / "a.json").read_text() == "ours"


# ------------------------------------------------------------------------------------------------
# What LMDeploy cannot run.


def test_a_name_without_a_template_is_refused(source: Path, tmp_path: Path) -> None:
    options = ConvertOptions("my-model", engine="lmdeploy")
    with pytest.raises(UsageError, match=r"model-name my-model is none that LMDeploy 0.2.3 knows"):
        convert(source, tmp_path / "tm", options, Progress())
    for name in MODEL_NAMES:
        check_model_name(name)


REFUSALS = {
    "head dim": (replace(SHAPE, head_dim=64, num_heads=8), {}, "head_dim is 64, their attention"),
    "hidden": (GQA_128, {}, "hidden_size is 128, config.ini means heads x head_dim = 1024"),
    "rope": (
        SHAPE,
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope scaling linear is not theirs",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_models_that_lmdeploy_cannot_run_are_refused(tmp_path: Path, name: str) -> None:
    shape, config, reason = REFUSALS[name]
    source = write_source(tmp_path / "source", shape, **config)
    with pytest.raises(PackageError, match=f"0.5.3 cannot run this model .*{reason}.*without --f"):
        convert(source, tmp_path / "tm", OPTIONS, Progress())
    assert not (tmp_path / "tm").exists()


def test_four_bit_groups_without_a_kernel_are_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "awq", SHAPE.config(), int4_tensors(SHAPE, 64))
    write_tokenizer(source)
    with pytest.raises(PackageError, match="group_size is 64, their kernels have 128 alone"):
        convert(source, tmp_path / "tm", OPTIONS, Progress())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"has_qk_norm": True}, "queries and keys are normalised per head"),
        ({"layers_without_rope": (0,)}, "1 layers do not rotate queries and keys"),
        ({"head_type": "int8"}, "the output head is int8, use --head fp16"),
        (
            {"weight_type": "int4", "group_size": 128, "fp16_linears": ("layers.0.attention.wo",)},
            "1 linears are fp16 among 4-bit ones",
        ),
    ],
)
def test_what_turbomind_has_no_key_for_is_refused(source: Path, change, reason) -> None:
    model = Checkpoint.open(source).model
    check_runs(model)
    with pytest.raises(PackageError, match=reason):
        check_runs(replace(model, **change))


@pytest.mark.parametrize("kind", ["dynamic", "qwen1"])
def test_scaling_beyond_the_trained_context_is_left_out_as_v023_does(source: Path, kind) -> None:
    check_runs(replace(Checkpoint.open(source).model, rope_scaling=RopeScaling(kind)))


def test_the_command_says_for_whom(source: Path, tmp_path: Path, capsys) -> None:
    arguments = ["convert", str(source), "--model-name", "base", "--output", str(tmp_path / "tm")]
    assert cli.main([*arguments, "--for", "lmdeploy"]) == 0
    assert (tmp_path / "tm" / "model_repository" / "turbomind").is_symlink()
    assert cli.main([*arguments[:3], "mine", *arguments[4:], "--for", "lmdeploy"]) == 2
    assert "model-name mine is none that LMDeploy" in capsys.readouterr().err
    with pytest.raises(UsageError, match="for is 'vllm'"):
        ConvertOptions("base", engine="vllm")


def test_a_disk_without_links_is_said(source: Path, tmp_path: Path, monkeypatch) -> None:
    def refuse(self: Path, target: str) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(tree.Path, "symlink_to", refuse)
    with pytest.raises(UsageError, match=r"cannot be a symbolic link \(Operation not permitted\)"):
        convert(source, tmp_path / "tm", OPTIONS, Progress())


def test_a_sentencepiece_model_comes_along(tmp_path: Path, monkeypatch) -> None:
    # The proof of the conversion has its own tests and takes seconds.
    monkeypatch.setattr("host_tools.convert.prove_tokenizer", lambda converted, progress: 0)
    source = write_checkpoint(tmp_path / "source", SHAPE.config(), llama_tensors(SHAPE.config()))
    tiny_sentencepiece.write_model(source)
    output = convert(source, tmp_path / "tm", OPTIONS, Progress())
    tokenizer = output / "triton_models" / "tokenizer"
    assert (tokenizer / "tokenizer.model").is_file()
    merges = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["merges"]
    assert all(isinstance(merge, str) for merge in merges)
