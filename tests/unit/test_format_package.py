import dataclasses
import os

import numpy as np
import pytest
from format_samples import (
    FP16,
    INT4,
    config_of,
    manifest_of,
    random_array,
    write_workspace,
)

from device_runtime.errors import PackageError
from device_runtime.package_format import names
from device_runtime.package_format.kv_scale import KvScale
from device_runtime.package_format.manifest import read_manifest, write_manifest
from device_runtime.package_format.package import open_package, verify_package
from device_runtime.package_format.tensors import tensor_specs

QWEIGHT = "layers.0.attention.w_qkv.0.qweight"

MODELS = {
    "int4": INT4,
    "fp16": FP16,
    "bf16 with biases on 2 ranks": dataclasses.replace(
        FP16,
        weight_type="bf16",
        has_attention_bias=True,
        num_attention_heads=4,
        num_kv_heads=2,
        vocab_size=71,
        tensor_para_size=2,
    ),
    "int4 with every extension": dataclasses.replace(
        INT4, tie_word_embeddings=True, has_qk_norm=True, head_type="int8", hidden_size=96
    ),
}


def weight(root, name):
    return root / names.WEIGHTS_DIR / name


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("is_sealed", [False, True])
def test_what_was_written_is_read(tmp_path, model, is_sealed):
    write_workspace(tmp_path, model, is_sealed=is_sealed)
    package = verify_package(tmp_path) if is_sealed else open_package(tmp_path)
    assert package.model == model
    assert package.config == config_of(model)
    assert package.name == "tiny-1.0"
    assert package.specs == tensor_specs(model, has_kv_scales=False)
    assert package.weight_bytes == sum(spec.size_bytes for spec in package.specs)
    for spec in package.specs:
        tensor = package.tensor(spec.name)
        assert tensor.dtype == spec.dtype
        assert tensor.shape == spec.shape
        assert tensor.tobytes() == random_array(spec).tobytes()
        assert not tensor.flags.writeable
    assert package.weights_dir == tmp_path / "triton_models" / "weights"
    assert package.tokenizer_dir == tmp_path / "triton_models" / "tokenizer"
    assert package.kernels_dir == tmp_path / "kernels"


@pytest.mark.parametrize("model", [INT4, FP16], ids=["int4", "fp16"])
def test_a_plain_workspace_opens_by_its_config_alone(tmp_path, model):
    write_workspace(tmp_path, model)
    # What LMDeploy's convert leaves around (spec section 1.1) is ignored.
    (tmp_path / "model_repository").mkdir()
    (tmp_path / "model_repository" / "turbomind").symlink_to("../triton_models/interactive")
    (tmp_path / "service_docker_up.sh").write_text("docker run\n")
    package = open_package(str(tmp_path))
    assert package.manifest is None
    assert package.name == "tiny"
    assert package.model == model


def test_the_root_may_be_reached_through_a_link(tmp_path):
    release = tmp_path / "release"
    release.mkdir()
    write_workspace(release, INT4, is_sealed=True)
    (tmp_path / "current").symlink_to("release")
    package = verify_package(tmp_path / "current")
    assert package.root == release


def test_static_kv_parameters_come_for_all_layers(tmp_path):
    write_workspace(tmp_path, INT4, is_sealed=True, has_kv_scales=True)
    package = verify_package(tmp_path)
    assert package.has_kv_scales
    assert package.kv_scale(1) == KvScale(0.5, 0.25, 0.125, -1.0)
    assert package.tensor("layers.1.past_kv_scale.0.weight").tolist() == [0.5, 0.25, 0.125, -1.0]
    with pytest.raises(PackageError, match=r"no tensor called 'layers\.2\.past_kv_scale"):
        package.kv_scale(2)


def test_a_package_without_static_kv_parameters_has_none(tmp_path):
    write_workspace(tmp_path, INT4, is_sealed=True)
    package = open_package(tmp_path)
    assert not package.has_kv_scales
    assert package.kv_scale(0) is None


def test_the_symmetric_files_of_lmdeploy_are_read(tmp_path):
    write_workspace(tmp_path, INT4)
    for layer in range(2):
        data = np.array([0.5, 0.25], "<f4").tobytes()
        weight(tmp_path, names.kv_scale_tensor(layer, 0)).write_bytes(data)
    assert open_package(tmp_path).kv_scale(1) == KvScale(0.5, 0.0, 0.25, 0.0)


def test_static_kv_parameters_of_some_layers_are_refused(tmp_path):
    write_workspace(tmp_path, INT4, has_kv_scales=True)
    weight(tmp_path, names.kv_scale_tensor(1, 0)).unlink()
    with pytest.raises(PackageError, match=r"has 1 past_kv_scale files, expected 2 or none"):
        open_package(tmp_path)


def test_a_damaged_kv_file_is_refused(tmp_path):
    write_workspace(tmp_path, INT4, has_kv_scales=True)
    weight(tmp_path, names.kv_scale_tensor(1, 0)).write_bytes(bytes(16))
    with pytest.raises(PackageError, match=r"k_scale 0.0, expected a finite number above 0"):
        open_package(tmp_path).kv_scale(1)
    weight(tmp_path, names.kv_scale_tensor(1, 0)).write_bytes(bytes(12))
    with pytest.raises(PackageError, match=r"past_kv_scale\.0\.weight has 12 bytes, expected 16"):
        open_package(tmp_path)


def every_file(model, is_sealed):
    files = [spec.path for spec in tensor_specs(model, has_kv_scales=False)]
    files.append(names.CONFIG_PATH)
    return files + ([names.tokenizer_path(names.TOKENIZER_JSON)] if is_sealed else [])


@pytest.mark.parametrize("is_sealed", [None, True])
def test_every_missing_file_is_named(tmp_path, is_sealed):
    write_workspace(tmp_path, INT4, is_sealed=is_sealed)
    for path in every_file(INT4, is_sealed):
        os.rename(tmp_path / path, tmp_path / "away")
        with pytest.raises(PackageError, match=f"^{path} is missing from"):
            open_package(tmp_path)
        os.rename(tmp_path / "away", tmp_path / path)
    assert open_package(tmp_path)


@pytest.mark.parametrize("is_sealed", [None, False, True])
@pytest.mark.parametrize("change", [-1, 1])
def test_every_weight_of_another_size_is_refused_with_both_sizes(tmp_path, is_sealed, change):
    write_workspace(tmp_path, INT4, is_sealed=is_sealed)
    for spec in tensor_specs(INT4, has_kv_scales=False):
        data = (tmp_path / spec.path).read_bytes()
        (tmp_path / spec.path).write_bytes(data[:change] if change < 0 else data + b"\0")
        size = spec.size_bytes
        with pytest.raises(
            PackageError, match=f"^{spec.path} has {size + change} bytes, expected {size};"
        ):
            open_package(tmp_path)
        (tmp_path / spec.path).write_bytes(data)
    assert open_package(tmp_path)


def test_a_sealed_package_keeps_its_config_and_tokenizer_sizes(tmp_path):
    write_workspace(tmp_path, INT4, is_sealed=True)
    for path in (names.CONFIG_PATH, names.tokenizer_path(names.TOKENIZER_JSON)):
        data = (tmp_path / path).read_bytes()
        (tmp_path / path).write_bytes(data + b"\n")
        with pytest.raises(PackageError, match=f"has {len(data) + 1} bytes, expected {len(data)}"):
            open_package(tmp_path)
        (tmp_path / path).write_bytes(data)


def test_config_ini_may_be_edited_by_hand_before_packing(tmp_path):
    write_workspace(tmp_path, INT4, is_sealed=False)
    config = tmp_path / names.CONFIG_PATH
    config.write_text(config.read_text().replace("quant_policy = 0", "quant_policy = 8"))
    assert open_package(tmp_path).config.quant_policy == 8
    config.write_text(config.read_text().replace("num_layer = 2", "num_layer = 3"))
    with pytest.raises(PackageError, match=r"num_layer 3, the manifest 2; convert again"):
        open_package(tmp_path)


def test_one_flipped_bit_fails_verification(tmp_path):
    write_workspace(tmp_path, INT4, is_sealed=True)
    for entry in read_manifest(tmp_path).files:
        path = tmp_path / entry.path
        if entry.path == names.CONFIG_PATH:
            continue  # opens first, and may fail to parse
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        assert open_package(tmp_path)
        with pytest.raises(PackageError, match=f"^{entry.path} has sha256 [0-9a-f]{{16}}..., the"):
            verify_package(tmp_path)
        path.write_bytes(data)
    assert verify_package(tmp_path)


def test_verification_reports_its_progress(tmp_path):
    write_workspace(tmp_path, INT4, is_sealed=True)
    seen = []
    package = verify_package(tmp_path, lambda done, total: seen.append((done, total)))
    assert package.manifest is not None
    total = package.manifest.size_bytes
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


def test_an_unlisted_file_fails_verification(tmp_path):
    write_workspace(tmp_path, INT4, is_sealed=True)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "extra.cubin").write_bytes(b"")
    assert open_package(tmp_path)
    with pytest.raises(PackageError, match=r"^kernels/extra.cubin in .* is not listed in manifest"):
        verify_package(tmp_path)


def test_an_unlisted_weight_does_not_open(tmp_path):
    write_workspace(tmp_path, INT4, is_sealed=True)
    manifest = read_manifest(tmp_path)
    files = tuple(entry for entry in manifest.files if QWEIGHT not in entry.path)
    write_manifest(tmp_path, dataclasses.replace(manifest, files=files))
    with pytest.raises(PackageError, match=f"{QWEIGHT} is not listed in manifest.json, pack again"):
        open_package(tmp_path)


@pytest.mark.parametrize("is_sealed", [None, False])
def test_a_workspace_without_hashes_cannot_be_verified(tmp_path, is_sealed):
    write_workspace(tmp_path, INT4, is_sealed=is_sealed)
    with pytest.raises(PackageError, match=r"was not packed and lists no hashes"):
        verify_package(tmp_path)


@pytest.mark.parametrize("path", [f"{names.WEIGHTS_DIR}/{QWEIGHT}", names.CONFIG_PATH])
def test_links_that_lead_out_are_refused(tmp_path, path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    write_workspace(root, INT4)
    os.rename(root / path, outside)
    (root / path).symlink_to(outside)
    with pytest.raises(PackageError, match=f"{path} leads out of .* through a link"):
        open_package(root)


def test_a_folder_link_that_leads_out_is_refused(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    write_workspace(root, INT4, is_sealed=True)
    os.rename(root / names.WEIGHTS_DIR, outside)
    (root / names.WEIGHTS_DIR).symlink_to(outside)
    with pytest.raises(PackageError, match=r"leads out of .* through a link"):
        open_package(root)


def test_a_manifest_link_that_leads_out_is_refused(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    write_workspace(root, INT4, is_sealed=True)
    os.rename(root / names.MANIFEST, tmp_path / "outside")
    (root / names.MANIFEST).symlink_to(tmp_path / "outside")
    with pytest.raises(PackageError, match=r"manifest.json leads out of"):
        open_package(root)


def test_links_inside_are_followed(tmp_path):
    write_workspace(tmp_path, INT4)
    path = weight(tmp_path, QWEIGHT)
    os.rename(path, tmp_path / "elsewhere")
    path.symlink_to("../../elsewhere")
    assert open_package(tmp_path).tensor(QWEIGHT).size == 1024


def test_things_that_are_no_files_are_refused(tmp_path):
    write_workspace(tmp_path, INT4, is_sealed=True)
    path = weight(tmp_path, QWEIGHT)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(PackageError, match=f"{QWEIGHT} in .* is not a regular file"):
        open_package(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(PackageError, match=r"is not a regular file"):
        open_package(tmp_path)
    path.rmdir()
    path.symlink_to(path.name)  # a link to itself
    with pytest.raises(PackageError, match=f"{QWEIGHT} is missing from"):
        open_package(tmp_path)


def test_a_manifest_that_is_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / names.MANIFEST)
    with pytest.raises(PackageError, match=r"manifest.json in .* is not a regular file"):
        open_package(tmp_path)


def test_folders_that_are_no_package_are_refused(tmp_path):
    with pytest.raises(PackageError, match=r"has neither manifest.json nor triton_models"):
        open_package(tmp_path)
    with pytest.raises(PackageError, match=r"none is not a folder, expected a package"):
        open_package(tmp_path / "none")
    (tmp_path / "file.tgz").write_bytes(b"")
    with pytest.raises(PackageError, match=r"file.tgz is not a folder"):
        open_package(tmp_path / "file.tgz")


def test_a_config_that_is_not_text_is_refused(tmp_path):
    write_workspace(tmp_path, INT4)
    config = tmp_path / names.CONFIG_PATH
    config.write_bytes(b"[llama]\n\xff")
    with pytest.raises(PackageError, match=r"is not UTF-8 at byte 8"):
        open_package(tmp_path)
    config.write_bytes(bytes(65537))
    with pytest.raises(PackageError, match=r"has 65537 bytes, expected at most 65536"):
        open_package(tmp_path)


def test_a_tensor_that_shrinks_after_opening_is_refused(tmp_path):
    write_workspace(tmp_path, INT4)
    package = open_package(tmp_path)
    os.truncate(weight(tmp_path, QWEIGHT), 4092)
    with pytest.raises(PackageError, match=r"has 4092 bytes, expected 4096"):
        package.tensor(QWEIGHT)
    with pytest.raises(PackageError, match=r"no tensor called 'layers.9.w.0.qweight'"):
        package.tensor("layers.9.w.0.qweight")


def test_a_manifest_without_tokenizer_is_refused(tmp_path):
    write_workspace(tmp_path, INT4)
    write_manifest(tmp_path, manifest_of(INT4))
    with pytest.raises(PackageError, match=r"tokenizer/tokenizer.json is missing from"):
        open_package(tmp_path)
