import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_convert_bytes import GQA_64
from tiny_checkpoints import llama_tensors, write_checkpoint
from tiny_tokenizer import write_tokenizer

from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format.checksums import hash_files
from device_runtime.package_format.manifest import read_manifest, write_manifest
from device_runtime.package_format.package import open_package
from host_tools.convert import convert
from host_tools.kv_qparams import kv_qparams
from host_tools.pack import content_paths
from host_tools.package_options import ConvertOptions, KvQparamsOptions
from host_tools.progress import Progress

HEADS, DIM, LAYERS = 4, 64, 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    source = tmp_path_factory.mktemp("kv") / "source"
    write_checkpoint(source, GQA_64.config(), llama_tensors(GQA_64.config()))
    write_tokenizer(source)
    return source


@pytest.fixture
def workspace(checkpoint, tmp_path):
    return convert(checkpoint, tmp_path / "tm", ConvertOptions("tiny"), Progress())


@pytest.fixture
def work_dir(tmp_path):
    return write_stats(tmp_path / "work")


def write_stats(
    folder, layers=LAYERS, heads=HEADS, seed=0, name="model.layers.{}", head_dim=DIM, order=reversed
):
    """Statistics as calibrate writes them, layers in another order than the model's."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for file in ("key_stats.pth", "value_stats.pth"):
        stats = {"max": {}, "min": {}, "absmax": {}}
        for layer in order(range(layers)):
            first = torch.randn(heads, head_dim, generator=generator).half() * 3
            second = torch.randn(heads, head_dim, generator=generator).half() * 3
            key = name.format(layer)
            stats["max"][key] = torch.maximum(first, second)
            stats["min"][key] = torch.minimum(first, second)
            stats["absmax"][key] = torch.maximum(first.abs(), second.abs())
        torch.save(stats, folder / file)
    return folder


def expected_floats(work_dir, layer, rank, tp, is_symmetric):
    """Spec section 4.2 in torch fp16 on the CPU, as LMDeploy computes it."""
    found = []
    for file in ("key_stats.pth", "value_stats.pth"):
        stats = torch.load(work_dir / file, weights_only=True)
        part = {k: v[f"model.layers.{layer}"].chunk(tp)[rank] for k, v in stats.items()}
        if is_symmetric:
            found += [(part["absmax"].max() / (2**7 - 1)).item(), 0.0]
        else:
            high, low = part["max"].max(), part["min"].min()
            found += [((high - low) / (2**8 - 1)).item(), ((high + low) / 2).item()]
    return struct.pack("<4f", *found)


def scale_files(workspace):
    folder = workspace / "triton_models" / "weights"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*past_kv_scale*"))}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("is_symmetric", [False, True], ids=["asym", "sym"])
def test_every_rank_gets_the_four_floats_of_the_formulas(
    checkpoint, work_dir, tmp_path, tp, is_symmetric
):
    workspace = convert(checkpoint, tmp_path / "tm", ConvertOptions("tiny", tp=tp), Progress())
    kv_qparams(work_dir, workspace, KvQparamsOptions(is_symmetric=is_symmetric), Progress())
    assert scale_files(workspace) == {
        f"layers.{layer}.past_kv_scale.{rank}.weight": expected_floats(
            work_dir, layer, rank, tp, is_symmetric
        )
        for layer in range(LAYERS)
        for rank in range(tp)
    }


def test_by_hand(workspace, tmp_path):
    # keys -3..12.75: scale 15.75/255 = 0.0617676 in fp16, zero (12.75-3)/2 = 4.875
    # values -1..1: scale 2/255 = 0.00784302 in fp16, zero 0
    work = tmp_path / "hand"
    work.mkdir()
    for file, low, high in (("key_stats.pth", -3.0, 12.75), ("value_stats.pth", -1.0, 1.0)):
        names = [f"model.layers.{layer}" for layer in range(LAYERS)]
        stats = {
            "min": {name: torch.full((HEADS, DIM), low).half() for name in names},
            "max": {name: torch.full((HEADS, DIM), high).half() for name in names},
        }
        torch.save(stats, work / file)
    kv_qparams(work, workspace, KvQparamsOptions(), Progress())
    data = scale_files(workspace)["layers.1.past_kv_scale.0.weight"]
    assert np.frombuffer(data, "<f4").tolist() == [
        float(np.float16(15.75 / 255)), 4.875, float(np.float16(2 / 255)), 0.0,
    ]  # fmt: skip


def test_the_package_knows_its_scales_and_packs_them(work_dir, workspace):
    assert not open_package(workspace).has_kv_scales
    assert read_manifest(workspace).quantization.kv_scales == "none"
    kv_qparams(work_dir, workspace, KvQparamsOptions(), Progress())
    package = open_package(workspace)
    assert package.has_kv_scales
    assert package.manifest.quantization.kv_scales == "asymmetric"
    assert package.kv_scale(1).to_bytes() == expected_floats(work_dir, 1, 0, 1, False)
    packed = [path for path in content_paths(package) if "past_kv_scale" in path]
    assert len(packed) == LAYERS
    kv_qparams(work_dir, workspace, KvQparamsOptions(is_symmetric=True), Progress())
    assert read_manifest(workspace).quantization.kv_scales == "symmetric"


def test_finished_work_is_kept(work_dir, workspace):
    kv_qparams(work_dir, workspace, KvQparamsOptions(), Progress())
    path = workspace / "triton_models" / "weights" / "layers.0.past_kv_scale.0.weight"
    made_ns = path.stat().st_mtime_ns
    kv_qparams(work_dir, workspace, KvQparamsOptions(), Progress())
    assert path.stat().st_mtime_ns == made_ns
    write_stats(work_dir, seed=1)
    kv_qparams(work_dir, workspace, KvQparamsOptions(), Progress())
    assert path.stat().st_mtime_ns > made_ns


def test_half_written_scales_are_written_again(work_dir, workspace):
    kv_qparams(work_dir, workspace, KvQparamsOptions(), Progress())
    whole = scale_files(workspace)
    (workspace / "triton_models/weights/layers.1.past_kv_scale.0.weight").unlink()
    kv_qparams(work_dir, workspace, KvQparamsOptions(), Progress())
    assert scale_files(workspace) == whole


def test_lmdeploys_weights_folder_names_the_workspace_too(work_dir, workspace):
    weights = workspace / "triton_models" / "weights"
    assert kv_qparams(work_dir, weights, KvQparamsOptions(tp=1), Progress()) == workspace
    assert len(scale_files(workspace)) == LAYERS


def test_a_workspace_of_lmdeploy_gets_its_files(checkpoint, work_dir, tmp_path):
    # head_num * size_per_head is hidden_size there: 2 heads of 64 on 128
    config = GQA_64.config(num_attention_heads=2, num_key_value_heads=2)
    source = write_checkpoint(tmp_path / "plain", config, llama_tensors(config))
    write_tokenizer(source)
    workspace = convert(source, tmp_path / "tm", ConvertOptions("tiny"), Progress())
    (workspace / "manifest.json").unlink()
    kv_qparams(write_stats(work_dir, heads=2), workspace, KvQparamsOptions(), Progress())
    assert open_package(workspace).has_kv_scales
    assert not (workspace / "manifest.json").exists()


def test_another_number_of_ranks_is_refused(work_dir, workspace):
    with pytest.raises(UsageError, match=r"tp is 2, .*tm is split for 1; use --tp 1"):
        kv_qparams(work_dir, workspace, KvQparamsOptions(tp=2), Progress())


def test_a_packed_package_is_not_touched(work_dir, workspace):
    manifest = read_manifest(workspace)
    entries = hash_files(workspace, content_paths(open_package(workspace)))
    write_manifest(workspace, replace(manifest, files=entries))
    with pytest.raises(UsageError, match="is a packed package, whose files are final"):
        kv_qparams(work_dir, workspace, KvQparamsOptions(), Progress())


@pytest.mark.parametrize("file", ["key_stats.pth", "value_stats.pth"])
def test_missing_statistics_are_named(work_dir, workspace, file):
    (work_dir / file).unlink()
    with pytest.raises(PackageError, match=f"{file} is not there, run calibrate"):
        kv_qparams(work_dir, workspace, KvQparamsOptions(), Progress())
    assert scale_files(workspace) == {}


@pytest.mark.parametrize(
    ("stats", "sentence"),
    [
        (b"not torch at all", "is no file of statistics, calibrate again"),
        ([1, 2], "is no file of statistics, calibrate again"),
        ({"max": {}}, "holds no min and max of layers"),
        ({"max": {"lm_head": 1}, "min": {}}, "holds no min and max of layers"),
        ({"max": {}, "min": {}}, "holds statistics of 0 layers, the workspace has 2"),
    ],
    ids=["bytes", "list", "no min", "no layer", "empty"],
)
def test_damaged_statistics_are_named(work_dir, workspace, stats, sentence):
    if isinstance(stats, bytes):
        (work_dir / "key_stats.pth").write_bytes(stats)
    else:
        torch.save(stats, work_dir / "key_stats.pth")
    with pytest.raises(PackageError, match=sentence):
        kv_qparams(work_dir, workspace, KvQparamsOptions(), Progress())


def test_statistics_of_another_model_are_refused(work_dir, workspace):
    with pytest.raises(PackageError, match="holds statistics of 3 layers, the workspace has 2"):
        kv_qparams(write_stats(work_dir, layers=3), workspace, KvQparamsOptions(), Progress())
    with pytest.raises(PackageError, match=r"holds \[2, 64\] for layer 0, .* has \[4, 64\]"):
        kv_qparams(write_stats(work_dir, heads=2), workspace, KvQparamsOptions(), Progress())


def test_code_in_a_statistics_file_is_not_run(work_dir, workspace, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"max": Hostile(), "min": {}}, work_dir / "key_stats.pth")
    with pytest.raises(PackageError, match="is no file of statistics"):
        kv_qparams(work_dir, workspace, KvQparamsOptions(), Progress())
    assert not (tmp_path / "owned").exists()


def test_a_folder_that_is_no_workspace_is_refused(work_dir, tmp_path):
    with pytest.raises(PackageError, match=r"config\.ini cannot be read, name a workspace"):
        kv_qparams(work_dir, tmp_path, KvQparamsOptions(), Progress())


def test_only_eight_bits_are_stored():
    with pytest.raises(UsageError, match="kv-bits is 4, the static KV cache stores 8 only"):
        KvQparamsOptions(kv_bits=4)
    with pytest.raises(UsageError, match="tp is -1, expected at least 1"):
        KvQparamsOptions(tp=-1)
