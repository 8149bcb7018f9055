"""The whole pipeline on a tiny checkpoint: what comes out, what is kept, what a kill leaves."""

import hashlib
import json
import multiprocessing
import random
import re
import shutil
import time
from pathlib import Path

import pytest
from test_convert_bytes import GQA_64, int4_tensors
from tiny_checkpoints import llama_tensors, write_checkpoint
from tiny_tokenizer import write_tokenizer

from device_runtime.errors import PackageError, UsageError
from device_runtime.kernels.cubins import Cubin, write_record
from device_runtime.package_format.archive_reader import extract_archive
from device_runtime.package_format.package import verify_package
from host_tools import cli
from host_tools.build import build
from host_tools.costs import read_costs
from host_tools.options import CalibrateOptions
from host_tools.package_options import BuildOptions, ConfigValues
from host_tools.progress import Progress
from host_tools.report.data import ArchiveFacts
from host_tools.report.gather import collect_report

NUM_KILLS = 12


class Notes(Progress):
    """Keeps what the stages say."""

    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A float checkpoint and a text to calibrate on."""
    folder = tmp_path_factory.mktemp("build")
    write_checkpoint(folder / "tiny-llama", GQA_64.config(), llama_tensors(GQA_64.config()))
    write_tokenizer(folder / "tiny-llama")
    letters = random.Random(0).choices("abcdefgh \n", k=4000)
    (folder / "text.txt").write_text("".join(letters))
    return folder / "tiny-llama"


def options(source, **changes):
    text = str(source.parent / "text.txt")
    calibration = CalibrateOptions(text, num_samples=2, seqlen=64, device="cpu")
    small = {"calibrate": calibration, "target": "orin-nano-8gb", "kernels": "none"}
    return BuildOptions(**{**small, **changes})


def run(source, folder, progress=None, **changes):
    return build(
        str(source), folder / "x.tgz", folder / "work", options(source, **changes),
        progress or Progress(),
    )  # fmt: skip


def test_every_stage_runs_in_order_and_the_package_installs(source, tmp_path):
    notes = Notes()
    report = run(source, tmp_path, notes)
    assert [stage.name for stage in report.stages] == [
        "fetch", "calibrate", "quantize", "convert", "kv-qparams", "pack",
    ]  # fmt: skip
    assert report.archive == tmp_path / "x.tgz"
    assert report.name == "tiny-llama"
    extract_archive(report.archive, tmp_path / "installed")
    package = verify_package(tmp_path / "installed")
    manifest = package.manifest
    assert package.has_kv_scales
    assert manifest.quantization.method == "awq"
    assert manifest.quantization.kv_scales == "asymmetric"
    assert manifest.provenance.source == "tiny-llama"
    assert manifest.provenance.calibration.num_samples == 2
    assert manifest.provenance.calibration.dataset == "text.txt"
    assert manifest.memory == report.memory
    # 128 divides hidden 128, 512 attention outputs and 256 inner
    assert manifest.model.group_size == 128
    # online int8 unless told; the whole context; pages of one kernel tile
    assert (package.config.quant_policy, package.config.session_len) == (8, 256)
    assert package.config.cache_block_seq_len == 64
    assert any(line.startswith("build: w-group-size 128") for line in notes.lines)
    assert any(line.startswith("plan for orin-nano-8gb: ") for line in notes.lines)
    for stage in report.stages:
        assert stage.seconds_s > 0
        assert stage.peak_anon_bytes > 1 << 20
        assert stage.size_bytes > 0
        assert not stage.is_kept


def test_a_build_leaves_a_report_of_what_it_made(source, tmp_path):
    report = run(source, tmp_path)
    assert report.page == tmp_path / "work" / "report.html"
    found = collect_report(tmp_path / "work")
    archive = (tmp_path / "x.tgz").read_bytes()
    digest = hashlib.sha256(archive).hexdigest()
    assert found.archive == ArchiveFacts("x.tgz", len(archive), digest)
    assert digest in report.page.read_text(encoding="utf-8")
    assert [stage.name for stage in found.stages] == [stage.name for stage in report.stages]
    assert found.package.memory == report.memory
    assert [found.layer for found in found.quantize.layers] == [0, 1]
    assert [found.layer for found in found.kv_ranges] == [0, 1]
    quantize = {stage.name: stage for stage in found.stages}["quantize"]
    run(source, tmp_path)
    again = {stage.name: stage for stage in collect_report(tmp_path / "work").stages}
    assert again["quantize"] == quantize
    (tmp_path / "work" / "evaluations.json").write_text("{")
    notes = Notes()
    assert run(source, tmp_path, notes).page is None
    assert any("there is no report: evaluations.json is not JSON" in line for line in notes.lines)


def test_a_second_build_keeps_every_stage_and_the_bytes(source, tmp_path):
    first = run(source, tmp_path)
    data, made_ns = first.archive.read_bytes(), first.archive.stat().st_mtime_ns
    second = run(source, tmp_path)
    # a folder is used where it lies, so there is nothing to keep of fetch
    assert [stage.name for stage in second.stages if not stage.is_kept] == ["fetch"]
    assert first.archive.read_bytes() == data
    assert first.archive.stat().st_mtime_ns == made_ns


def test_a_changed_setting_repeats_only_what_depends_on_it(source, tmp_path):
    run(source, tmp_path)
    report = run(source, tmp_path, config=ConfigValues(session_len=100))
    kept = [stage.name for stage in report.stages if stage.is_kept]
    assert kept == ["calibrate", "quantize"]


def test_two_builds_elsewhere_give_the_same_bytes(source, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = run(source, tmp_path / "a"), run(source, tmp_path / "b")
    assert first.archive.read_bytes() == second.archive.read_bytes()


def test_float_weights_need_no_calibration(source, tmp_path):
    report = run(source, tmp_path, method="none")
    assert [stage.name for stage in report.stages] == ["fetch", "convert", "pack"]


def test_round_to_nearest_needs_no_calibration(source, tmp_path):
    report = run(source, tmp_path, method="rtn", group_size=64)
    assert [stage.name for stage in report.stages] == ["fetch", "quantize", "convert", "pack"]
    extract_archive(report.archive, tmp_path / "installed")
    package = verify_package(tmp_path / "installed")
    assert package.manifest.quantization.method == "rtn"
    assert package.model.group_size == 64


def test_the_static_kv_cache_calibrates_float_weights_too(source, tmp_path):
    report = run(source, tmp_path, method="none", config=ConfigValues(quant_policy=4))
    assert [stage.name for stage in report.stages] == [
        "fetch", "calibrate", "convert", "kv-qparams", "costs", "pack",
    ]  # fmt: skip


def test_costs_are_measured_on_the_devices_of_the_build(source, tmp_path, monkeypatch):
    given = []

    def stop(*values):
        given.append(values[3:])
        raise UsageError("that is all")

    monkeypatch.setattr("host_tools.build.measure_costs", stop)
    text = str(source.parent / "text.txt")
    calibration = CalibrateOptions(text, 2, 64, "auto", devices=("cpu", "cpu"))
    with pytest.raises(UsageError, match="that is all"):
        run(source, tmp_path, method="rtn", head="int8", calibrate=calibration)
    ((device, _, devices),) = given
    assert (device, devices) == ("auto", ("cpu", "cpu"))


def test_an_int8_head_and_the_static_kv_cache_say_what_they_cost(source, tmp_path):
    notes = Notes()
    config = ConfigValues(quant_policy=4)
    run(source, tmp_path, notes, method="rtn", head="int8", config=config)
    told = [line for line in notes.lines if " perplexity (" in line]
    assert [re.sub("costs.*", "", line).removeprefix("warning: ").strip() for line in told] == [
        "static int8 KV", "int8 head", "static int8 KV and int8 head",
    ]  # fmt: skip
    found = read_costs(tmp_path / "work")
    for cost, line in zip(found.costs, told, strict=True):
        assert f"{100 * cost.increase:.2f} %" in line
    package = verify_package(extract_archive(tmp_path / "x.tgz", tmp_path / "device").root)
    assert package.model.head_type == "int8" and package.has_kv_scales
    report = run(source, tmp_path, method="rtn", head="int8", config=config)
    assert [stage.name for stage in report.stages if not stage.is_kept] == ["fetch"]


def test_a_report_tells_nothing_of_an_earlier_build(source, tmp_path):
    run(source, tmp_path, config=ConfigValues(quant_policy=4))
    run(source, tmp_path, method="none")
    found = collect_report(tmp_path / "work")
    assert (found.quantize, found.kv_ranges, found.perplexities) == (None, (), ())
    assert {setting.stage for setting in found.settings} == {"convert", "pack"}
    page = (tmp_path / "work" / "report.html").read_text(encoding="utf-8")
    assert "against plain rounding" not in page and "Clipping" not in page


def test_an_evaluation_goes_with_the_archive_that_it_was_of(source, tmp_path):
    run(source, tmp_path, method="rtn")
    targets = [str(source), str(tmp_path / "x.tgz")]
    sizes = ["--dataset", str(source.parent / "text.txt"), "--samples", "1", "--seqlen", "16"]
    work = ["--work-dir", str(tmp_path / "work"), "--device", "cpu"]
    assert cli.main(["evaluate", *targets, *sizes, *work]) == 0

    def shown():
        (table,) = collect_report(tmp_path / "work").perplexities
        return [row.target for row in table.rows]

    run(source, tmp_path, method="rtn")
    assert shown() == ["tiny-llama", "x.tgz"]
    run(source, tmp_path, method="rtn", group_size=32)
    assert shown() == ["tiny-llama"]


def test_costs_go_with_the_savings(source, tmp_path):
    run(source, tmp_path, method="rtn", head="int8")
    assert [table.title for table in collect_report(tmp_path / "work").perplexities] == [
        "savings of this package"
    ]
    run(source, tmp_path, method="rtn")
    assert read_costs(tmp_path / "work") is None
    assert not collect_report(tmp_path / "work").perplexities


def test_a_quantized_source_is_converted_as_it_is(tmp_path):
    awq = tmp_path / "awq"
    write_checkpoint(awq, GQA_64.config(), int4_tensors(GQA_64, 64))
    write_tokenizer(awq)
    (tmp_path / "text.txt").write_text("x")
    notes = Notes()
    report = run(awq, tmp_path, notes)
    assert [stage.name for stage in report.stages] == ["fetch", "convert", "pack"]
    assert any("is quantized already, in groups of 64" in line for line in notes.lines)
    with pytest.raises(UsageError, match="quant-policy 4 needs statistics of the floating-point"):
        run(awq, tmp_path, config=ConfigValues(quant_policy=4))


def test_a_model_too_large_for_its_board_stops_before_the_long_stages(source, tmp_path):
    with pytest.raises(UsageError, match="session-len 99999999 does not fit on orin-nano-8gb"):
        run(source, tmp_path, config=ConfigValues(session_len=99999999))
    assert not (tmp_path / "work" / "key_stats.pth").exists()


def refused_early(source, folder, error, match, **changes):
    with pytest.raises(error, match=match):
        run(source, folder, **changes)
    assert not (folder / "work" / "key_stats.pth").exists()


def test_a_source_without_an_eos_token_stops_before_the_long_stages(source, tmp_path):
    copy = shutil.copytree(source, source.parent / "endless")
    write_tokenizer(copy, eos_token=None)
    (copy / "generation_config.json").unlink()
    message = f"{copy} names no eos token in .*, add eos_token_id to config.json"
    refused_early(copy, tmp_path, PackageError, message)
    config = {**json.loads((copy / "config.json").read_text()), "eos_token_id": 2}
    (copy / "config.json").write_text(json.dumps(config))
    assert run(copy, tmp_path, method="none").archive.is_file()


def test_a_broken_chat_template_stops_before_the_long_stages(source, tmp_path):
    copy = shutil.copytree(source, source.parent / "broken")
    write_tokenizer(copy, chat_template="{% for %}")
    message = rf"the chat template of tokenizer_config\.json is not usable: .* \(in {copy}\)"
    refused_early(copy, tmp_path, PackageError, message)


def test_an_unknown_chat_template_stops_before_the_long_stages(source, tmp_path):
    message = "there is no chat template 'nonsense', expected one of"
    refused_early(source, tmp_path, UsageError, message, template="nonsense")


def test_kernels_that_are_not_there_stop_before_the_long_stages(source, tmp_path):
    folder = tmp_path / "kernels"
    message = "kernels is no folder of kernels, turbojet-host kernels makes one"
    refused_early(source, tmp_path, UsageError, message, kernels=str(folder), target="all")
    folder.mkdir()
    write_record(folder, [Cubin("x.cubin", "x", 87, "12.6", 0, False, "", "", "", ())])
    message = r"kernels has no sm_87-cuda11\.8\..*\.cubin, which a target board needs"
    refused_early(source, tmp_path, UsageError, message, kernels=str(folder))


@pytest.mark.parametrize("place", ["x.tgz", "x.tgz/work"])
def test_a_work_folder_in_the_archives_place_is_refused(source, tmp_path, place):
    with pytest.raises(UsageError, match=r"would lie where the archive .*x\.tgz goes, name anoth"):
        build(str(source), tmp_path / "x.tgz", tmp_path / place, options(source), Progress())
    assert not list(tmp_path.iterdir())


def test_an_archive_in_the_workspace_is_refused(source, tmp_path):
    work = tmp_path / "work"
    with pytest.raises(UsageError, match=r"x\.tgz lies in .*turbomind, which stays as it is"):
        build(str(source), work / "turbomind" / "x.tgz", work, options(source), Progress())
    assert not work.exists()


def test_an_archives_name_that_is_too_long_stops_before_anything(source, tmp_path):
    with pytest.raises(UsageError, match=r"has 256 bytes, a file's name at most 255"):
        build(str(source), tmp_path / ("x" * 251), tmp_path / "work", options(source), Progress())
    assert not list(tmp_path.iterdir())


def test_sizes_that_do_not_fit_the_model_are_the_callers_to_change(source, tmp_path):
    with pytest.raises(UsageError, match=r"tp 8 does not fit .*: num_kv_heads 4 is not a multiple"):
        run(source, tmp_path, tp=8)
    misfit = "w-group-size 128 does not fit tp 4: intermediate_size 64 is not a multiple"
    with pytest.raises(UsageError, match=misfit):
        run(source, tmp_path, tp=4, group_size=128)
    config = GQA_64.config(intermediate_size=160)
    odd = write_checkpoint(tmp_path / "odd", config, llama_tensors(config))
    write_tokenizer(odd)
    with pytest.raises(UsageError, match=r"w-group-size 64 does not divide .* use 32"):
        build(str(odd), tmp_path / "x.tgz", tmp_path / "w", options(source, group_size=64), Notes())
    assert not (tmp_path / "w" / "calibration_tokens.safetensors").exists()


def test_an_unknown_board_stops_before_anything(source, tmp_path):
    with pytest.raises(UsageError, match="no board is called 'nano'"):
        run(source, tmp_path, target="nano")
    assert not (tmp_path / "work").exists()


def test_a_folder_as_output_is_refused(source, tmp_path):
    with pytest.raises(UsageError, match="is a folder, name the archive to write in it"):
        build(str(source), tmp_path, tmp_path / "work", options(source), Progress())


def build_in_child(source, folder):
    import torch

    torch.set_num_threads(1)
    run(Path(source), Path(folder))


def test_a_build_killed_at_any_moment_resumes_and_ends_with_the_same_bytes(source, tmp_path):
    # A server that has torch loaded forks the children: a kill then falls into the build itself.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_build"])
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def start(folder):
        child = context.Process(target=build_in_child, args=(str(source), str(folder)))
        child.start()
        return child

    start(tmp_path / "warm").join()
    started_s = time.monotonic()
    child = start(whole)
    child.join()
    assert child.exitcode == 0
    whole_s = time.monotonic() - started_s
    draw = random.Random(1)
    num_killed = 0
    for _ in range(NUM_KILLS):
        child = start(killed)
        child.join(draw.uniform(0.0, 0.7 * whole_s))
        num_killed += child.exitcode is None
        child.kill()
        child.join()
    assert num_killed
    child = start(killed)
    child.join()
    assert child.exitcode == 0
    assert (killed / "x.tgz").read_bytes() == (whole / "x.tgz").read_bytes()
    names = {path.name for path in killed.iterdir()}
    assert names == {"x.tgz", "work"}
