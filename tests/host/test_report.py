"""The report of a build: gathered from records made by hand, drawn, and read again."""

import hashlib
import json
import shutil
from html.parser import HTMLParser

import pytest
import torch
from test_convert_bytes import GQA_64, int4_tensors
from tiny_checkpoints import llama_tensors, write_checkpoint
from tiny_tokenizer import write_tokenizer

from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format import strict_json
from device_runtime.package_format.package import open_package
from host_tools import cli
from host_tools import layer_records as records
from host_tools.convert import convert
from host_tools.costs import STATIC_KV, Cost, CostReport, write_costs
from host_tools.evaluate import Comparison, EvaluationReport, PerplexityResult
from host_tools.markup import element, visible
from host_tools.package_options import ConfigValues, ConvertOptions
from host_tools.progress import Progress
from host_tools.report.data import (
    ArchiveFacts,
    PerplexityRow,
    PerplexityTable,
    Report,
    StageFigures,
)
from host_tools.report.figures import clip_shares, layer_means, median_gain
from host_tools.report.gather import collect_report, write_report
from host_tools.report.plots import Scale, round_step
from host_tools.report.records import (
    MAX_TABLES,
    BuildRecord,
    Evaluation,
    Measured,
    add_evaluation,
    current_tables,
    evaluation_table,
    measured_targets,
    read_build_record,
    read_evaluations,
    write_build_record,
)

HOSTILE = '<script src="http://evil/x.js">alert(1)</script> & "q" \'s\' \u202e\x00'
ARCHIVE = ArchiveFacts("x.tgz", 1234567, "ab" * 32)
STAGES = (
    StageFigures("quantize", 30.0, 2_000_000, 3_000_000),
    StageFigures("pack", 1.5, 1_000_000, 1_234_567),
)
CALIBRATE = StageFigures("calibrate", 5.0, 2_000_000, 4_000_000)
GONE = Measured("../checkpoint", False, "cd" * 32)


def linear(name, signal, rounded, final, bits=4):
    if bits == 16:
        return records.LinearRecord(name, 8, 16, 16)
    counts = records.clip_counts([1.0, 1.0, 1.0, 0.75])
    return records.LinearRecord(name, 8, 16, 4, signal, rounded, None, final, None, 0.5, counts)


LAYERS = (
    records.LayerRecord(0, (linear("o", 100.0, 4.0, 2.0), linear("down", 10.0, 1.0, 0.25))),
    records.LayerRecord(1, (linear("o", 0, 0, 0, bits=16), linear("down", 50.0, 1.0, 0.5))),
)
QUANTIZE = records.QuantizeRecord("f" * 64, "awq", 64, "cpu", LAYERS)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    source = write_checkpoint(folder / "awq", GQA_64.config(), int4_tensors(GQA_64, 64))
    write_tokenizer(source)
    options = ConvertOptions("tiny", config=ConfigValues(quant_policy=8, session_len=64))
    return convert(source, folder / "turbomind", options, Progress())


@pytest.fixture
def work(workspace, tmp_path):
    """A work folder in which every stage has noted something."""
    (tmp_path / "turbomind").symlink_to(workspace)
    stage = {
        "fingerprint": QUANTIZE.fingerprint,
        "settings": {"group_size": 64, "keep_fp16": ["layers.1.o", HOSTILE], "none": None},
        "outputs": {},
        "times": {
            "seconds": {"search": 20.0, "forward": 8.0, "other": 2.0, "total": 30.0},
            "seconds_beside": {"packing": 0.5},
        },
    }
    (tmp_path / "awq" / ".turbojet").mkdir(parents=True)
    (tmp_path / "awq" / ".turbojet" / "quantize.json").write_text(json.dumps(stage))
    records.write_quantize_record(tmp_path, QUANTIZE)
    stages = (CALIBRATE, *STAGES)
    write_build_record(tmp_path, BuildRecord("orin-nano-8gb,agx-orin-64gb", ARCHIVE, stages))
    write_costs(tmp_path, CostReport("builtin", 8, 512, 20.0, (Cost(STATIC_KV, 20.3, 0.015),)))
    rows = (
        PerplexityRow(HOSTILE, "checkpoint", 22.552),
        PerplexityRow("x.tgz", "package", 24.8, 0.0997, 0.0912, 0.805),
    )
    table = PerplexityTable("evaluate", "wikitext2", 16, 1024, rows)
    add_evaluation(tmp_path, table, (GONE, Measured("../x.tgz", True, ARCHIVE.sha256)))
    for file, top in (("key_stats.pth", 8.0), ("value_stats.pth", 2.0)):
        shape = (open_package(workspace).model.num_kv_heads, GQA_64.head_dim)
        stats = {"max": {}, "min": {}}
        for layer in range(GQA_64.num_hidden_layers):
            stats["max"][f"model.layers.{layer}"] = torch.full(shape, top + layer).half()
            stats["min"][f"model.layers.{layer}"] = -torch.full(shape, top / 2).half()
        torch.save(stats, tmp_path / file)
    return tmp_path


class Page(HTMLParser):
    """Checks the nesting and keeps tables, texts and attributes."""

    VOID = ("meta",)

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.attributes, self.tags, self.rows = [], [], [], set(), []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open[-1:] != ["style"] and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture
def page(work):
    return Page(write_report(work).read_text(encoding="utf-8"))


def test_the_page_stands_alone(page, work):
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "a"}
    for name, value in page.attributes:
        assert name not in ("src", "href", "style", "srcset", "xlink:href"), (name, value)
        assert not name.startswith("on")
    style = (work / "report.html").read_text().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style and "://" not in style
    policy = ("content", "default-src 'none'; style-src 'unsafe-inline'")
    assert policy in page.attributes
    assert "prefers-color-scheme: dark" in style
    assert (work / "report.html").stat().st_size < 200_000


def test_the_page_says_what_computed(page):
    assert any("Computed on: cpu." in text for text in page.texts)


def test_hostile_names_are_text(page, work):
    shown = visible(HOSTILE)
    assert shown.endswith("'s' \ufffd\ufffd")
    assert any(shown in text for text in page.texts)
    assert "<script" not in (work / "report.html").read_text()
    found = element("p", HOSTILE, title=HOSTILE)
    parsed = Page(found)
    assert parsed.texts == [shown]
    assert parsed.attributes == [("title", shown)]


def test_errors_are_those_of_the_records(page):
    # Layer 0: 4/100 and 1/10, final 2/100 and 0.25/10; layer 1: 1/50 and 0.5/50, o stays fp16.
    assert layer_means(QUANTIZE, lambda found: found.rounded) == pytest.approx([0.07, 0.02])
    assert layer_means(QUANTIZE, lambda found: found.final) == pytest.approx([0.0225, 0.01])
    assert layer_means(QUANTIZE, lambda found: found.scaled) == [None, None]
    # Gains 1 - 2/4, 1 - 0.25/1 and 1 - 0.5/1: the median is a half.
    assert median_gain(QUANTIZE) == 0.5
    rows = {row[0]: row for row in page.rows}
    assert rows["layers.0.down"][1:] == ["8 x 16", "10", "1", "", "0.25", "", "2.5 %"]
    assert rows["layers.1.o"][-1] == "fp16"
    titles = [text for text in page.texts if text.startswith("layer 0, ")]
    assert titles[:1] == ["layer 0, rounded to nearest: 7 %"]
    assert "layer 1, scaled, clipped: 1 %" in page.texts
    assert not any(", compensated:" in text for text in page.texts)
    assert "layers.1.o: fp16" in page.texts and "layers.1.q: nothing noted" in page.texts
    assert "−50 %" in page.texts


def test_clipping_counts_all_groups(page):
    # Nine groups of twelve keep everything, three keep 0.75 of their range.
    shares = clip_shares(QUANTIZE)
    assert (shares[40], shares[30], sum(shares)) == (0.75, 0.25, 1.0)
    assert "75: 25.00 %" in page.texts
    assert any(
        text.startswith("75.0 % of the groups keep their whole range") for text in page.texts
    )


def test_perplexity_tables_show_what_is_above_one_percent(page):
    rows = {row[0]: row for row in page.rows}
    assert rows["x.tgz"] == ["x.tgz", "package", "24.800", "+9.97 %", "0.0912", "80.5 %"]
    assert rows[STATIC_KV][2:] == ["20.300", "+1.50 %"]
    assert ("class", "warn") in page.attributes


def test_sizes_are_those_of_the_files(page, workspace, work):
    facts = collect_report(work).package
    sizes = {part.name: (part.num_files, part.size_bytes) for part in facts.parts}
    weights = workspace / "triton_models" / "weights"

    def measured(pattern):
        found = list(weights.glob(pattern))
        return len(found), sum(path.stat().st_size for path in found)

    assert sizes["4-bit codes"] == measured("layers.*.qweight")
    assert sizes["scales and zeros"] == measured("*.scales_zeros")
    assert sizes["embedding"] == measured("tok_embeddings.weight")
    assert sizes["output head"] == measured("output.weight")
    assert sizes["norms and biases"] == measured("*norm.weight")
    assert sizes["config.ini"] == measured("config.ini")
    tokenizer = list((workspace / "triton_models" / "tokenizer").iterdir())
    assert sizes["tokenizer"] == (len(tokenizer), sum(f.stat().st_size for f in tokenizer))
    assert facts.linear_bytes == sizes["4-bit codes"][1] + sizes["scales and zeros"][1]
    assert facts.num_linear_weights == 2 * sizes["4-bit codes"][1]
    # Four bits, and 32 for a scale and a zero of 64 weights.
    assert "4.50 bits" in page.texts
    rows = {row[0]: row for row in page.rows}
    total = sum(size for _, size in sizes.values())
    assert rows["all"][2].replace(" ", "") == str(total)
    assert "ab" * 32 in page.texts and "1 234 567 bytes" in page.texts


def test_each_target_board_has_its_plan(page):
    boards = [row for row in page.rows if row[0] in ("orin-nano-8gb", "agx-orin-64gb")]
    assert [row[0] for row in boards] == ["orin-nano-8gb", "agx-orin-64gb"]
    for row in boards:
        usable, weights, workspace, kv, free = map(int, row[1:6])
        assert 128 < workspace < 512  # context, Python, staging; unit/test_board_plan.py adds it up
        assert abs(usable - weights - workspace - kv - free) <= 3  # each is rounded down


def test_times_and_ranges_are_shown(page, work):
    stages = [row for row in page.rows if row[0] == "quantize" and len(row) == 5]
    phases = (
        "search 20.0 s, 66.7 %; forward 8.0 s, 26.7 %; other 2.0 s, 6.7 %; beside it packing 0.5 s"
    )
    assert stages == [["quantize", phases, "30.0", "2.0 MB", "3.0 MB"]]
    assert "quantize, search: 20.0 s" in page.texts and "quantize, other: 2.0 s" in page.texts
    assert "layer 1: -4 to 9" in page.texts and "layer 0: -1 to 2" in page.texts
    settings = [row for row in page.rows if row[0] == "quantize" and len(row) == 3]
    assert settings == [
        ["quantize", "group_size", "64"],
        ["quantize", "keep_fp16", f"layers.1.o, {visible(HOSTILE)}"],
    ]


def test_the_json_is_the_report(work):
    write_report(work)
    text = (work / "report.json").read_bytes()
    value = strict_json.parse_object(text, "report.json", 1 << 22)
    assert strict_json.decode(Report, value, "report.json") == collect_report(work)


def test_the_same_records_give_the_same_page(work):
    first = write_report(work).read_bytes()
    assert write_report(work).read_bytes() == first


def test_notes_of_another_quantization_are_left_out(work):
    record = records.QuantizeRecord("e" * 64, "awq", 64, "cpu", LAYERS)
    records.write_quantize_record(work, record)
    assert collect_report(work).quantize is None
    page = Page(write_report(work).read_text())
    assert "no errors were noted: nothing was searched" in page.texts


def test_stages_of_an_earlier_build_are_left_out(work):
    (work / "build.json").unlink()
    one_by_one = collect_report(work)
    assert one_by_one.quantize == QUANTIZE and one_by_one.kv_ranges and one_by_one.settings
    write_build_record(work, BuildRecord("orin-nano-8gb", ARCHIVE, STAGES[1:]))
    found = collect_report(work)
    assert (found.quantize, found.kv_ranges) == (None, ())
    assert not [setting for setting in found.settings if setting.stage == "quantize"]
    texts = Page(write_report(work).read_text()).texts
    assert "output error" not in texts and "Clipping" not in texts


def test_a_quantization_is_not_that_of_a_float_package(work, tmp_path_factory):
    folder = tmp_path_factory.mktemp("float")
    write_checkpoint(folder / "tiny", GQA_64.config(), llama_tensors(GQA_64.config()))
    write_tokenizer(folder / "tiny")
    (work / "turbomind").unlink()
    convert(folder / "tiny", work / "turbomind", ConvertOptions("tiny"), Progress())
    assert collect_report(work).quantize is None


def test_a_folder_with_little_in_it_has_a_small_report(tmp_path):
    records.write_quantize_record(tmp_path, QUANTIZE)
    page = Page(write_report(tmp_path).read_text())
    assert tmp_path.name in page.texts
    assert any("turbojet-host evaluate --work-dir" in text for text in page.texts)
    assert "Size" not in page.texts and "Time" not in page.texts


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds nothing to report, name the work folder of a"):
        write_report(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_stage_records_are_named(work, content):
    (work / "awq" / ".turbojet" / "quantize.json").write_text(content)
    with pytest.raises(PackageError, match=r"quantize\.json is damaged, run the stage again"):
        write_report(work)


def test_a_config_ini_that_no_device_runs_is_named(workspace, tmp_path):
    config = shutil.copytree(workspace, tmp_path / "turbomind") / "triton_models/weights/config.ini"
    config.write_text(config.read_text().replace("quant_policy = 8", "quant_policy = 5"))
    with pytest.raises(PackageError, match="quant_policy is 5, expected 0"):
        write_report(tmp_path)


def test_a_kept_stage_keeps_its_figures(tmp_path):
    write_build_record(tmp_path, BuildRecord("all", ARCHIVE, STAGES))
    again = (
        StageFigures("quantize", 0.1, 5, 3_000_000),
        StageFigures("convert", 2.0, 5, 6),
        StageFigures("pack", 1.0, 7, 8),
    )
    record = BuildRecord("all", ARCHIVE, again)
    write_build_record(tmp_path, record, frozenset({"quantize", "convert"}))
    assert read_build_record(tmp_path).stages == (STAGES[0], *again[1:])
    (tmp_path / "build.json").write_text("{")
    with pytest.raises(PackageError, match=r"build\.json is not JSON"):
        read_build_record(tmp_path)
    write_build_record(tmp_path, record, frozenset({"quantize"}))
    assert read_build_record(tmp_path).stages == again


def test_an_evaluation_is_kept_once_and_only_the_last_ones(tmp_path):
    report = EvaluationReport(
        "wikitext2",
        2,
        64,
        (
            PerplexityResult("/a/checkpoint", "checkpoint", 20.0, 126, 1.0),
            PerplexityResult("/b/x.tgz", "package", 21.0, 126, 2.0),
        ),
        (Comparison("/b/x.tgz", 0.05, 0.02, 0.9),),
    )
    table = evaluation_table(report)
    assert table.rows == (
        PerplexityRow("checkpoint", "checkpoint", 20.0),
        PerplexityRow("x.tgz", "package", 21.0, 0.05, 0.02, 0.9),
    )
    add_evaluation(tmp_path, table, (GONE, Measured("x.tgz", True, "ef" * 32)))
    add_evaluation(tmp_path, table, (GONE, GONE))
    assert list(read_evaluations(tmp_path)) == [Evaluation(table, (GONE, GONE))]
    for seqlen in range(2, 2 + MAX_TABLES):
        other = PerplexityTable("evaluate", "x", 1, seqlen, table.rows)
        add_evaluation(tmp_path, other, (GONE, GONE))
    tables = [found.table for found in read_evaluations(tmp_path)]
    assert len(tables) == MAX_TABLES and table not in tables


def test_rows_are_shown_while_their_targets_are_what_was_measured(tmp_path):
    work, base, archive = tmp_path / "x.work", tmp_path / "base", tmp_path / "x.tgz"
    for folder in (work, base):
        folder.mkdir()
    (base / "config.json").write_text("{}")
    archive.write_bytes(b"first")
    rows = (
        PerplexityRow("base", "checkpoint", 20.0),
        PerplexityRow("x.tgz", "package", 21.0, 0.05),
    )
    table = PerplexityTable("evaluate", "builtin", 2, 64, rows)
    measured = measured_targets(work, [base, archive])
    first = ArchiveFacts("x.tgz", 5, hashlib.sha256(b"first").hexdigest())
    assert measured[1] == Measured("../x.tgz", True, first.sha256)
    add_evaluation(work, table, measured)

    def shown(built=None, folder=work):
        return [found.rows for found in current_tables(folder, built)]

    assert shown() == [rows]
    archive.write_bytes(b"other")
    assert shown() == [rows[:1]]
    archive.unlink()  # it may have gone to a board
    assert shown(first) == [rows]
    assert shown() == shown(ARCHIVE) == [rows[:1]]
    archive.write_bytes(b"first")
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert shown(folder=moved / "x.work") == [rows]
    (moved / "base" / "config.json").write_text("{ }")
    assert shown(folder=moved / "x.work") == []
    (moved / "base" / "config.json").unlink()
    (moved / "base").rmdir()  # gone to save the space, not made anew
    assert shown(folder=moved / "x.work") == [rows]
    moved.rename(tmp_path)


def test_tables_that_do_not_say_what_was_measured_are_left_out(tmp_path):
    (tmp_path / "evaluations.json").write_text('{"tables": []}')
    assert list(read_evaluations(tmp_path)) == []
    (tmp_path / "evaluations.json").write_text("{")
    with pytest.raises(PackageError, match=r"evaluations\.json is not JSON"):
        read_evaluations(tmp_path)


def test_the_verb_prints_the_page(work, capsys):
    assert cli.main(["report", str(work)]) == 0
    assert capsys.readouterr().out.strip() == str(work / "report.html")


def test_evaluate_adds_its_table(work, workspace, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sizes = ("--dataset", str(text), "--samples", "2", "--seqlen", "16", "--device", "cpu")
    targets = (str(workspace.parent / "awq"), str(workspace))
    arguments = ["evaluate", *targets, *sizes, "--work-dir", str(work), "--json"]
    assert cli.main(arguments) == 0
    output = capsys.readouterr()
    measured = json.loads(output.out)["results"]
    assert f"report: {work / 'report.html'}" in output.err
    found = collect_report(work).perplexities
    assert [table.dataset for table in found] == ["wikitext2", "text.txt", "builtin"]
    assert [row.perplexity for row in found[1].rows] == [
        pytest.approx(result["perplexity"]) for result in measured
    ]
    rows = {row[0]: row for row in Page((work / "report.html").read_text()).rows}
    assert rows["turbomind"][2] == f"{measured[1]['perplexity']:.3f}"
    assert cli.main([*arguments[:2], str(tmp_path / "nowhere"), *arguments[3:]]) == 2
    assert "nowhere, name a checkpoint" in capsys.readouterr().err


def test_scales_have_round_ticks():
    assert [round_step(x) for x in (0.3, 1.0, 2.1, 6.0, 0.0)] == [0.5, 1.0, 5.0, 10.0, 1.0]
    assert Scale(-3.0, 7.0, 100, 0).ticks() == [-2.0, 0.0, 2.0, 4.0, 6.0]
    assert Scale(0.01, 0.1, 0, 1, is_log=True).ticks() == pytest.approx([0.01, 0.02, 0.05, 0.1])
    scale = Scale(1.0, 100.0, 200, 0, is_log=True)
    assert (scale.at(10.0), scale.at(0.5), scale.at(1000.0)) == (pytest.approx(100), 200, 0)
