import dataclasses
import json

import pytest
from format_samples import FP16, INT4, manifest_of
from hypothesis import given, settings
from hypothesis import strategies as st

from device_runtime.errors import PackageError
from device_runtime.package_format.manifest import (
    FORMAT_VERSION,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    Quantization,
    TemplateChoice,
    TokenizerFacts,
    read_manifest,
    write_manifest,
)
from device_runtime.package_format.model_config import RopeScaling

SHA = "0123456789abcdef" * 4
FILES = (FileEntry("a/b", 5, SHA), FileEntry("c", 0, SHA))


def as_json(**changes):
    value = json.loads(manifest_of(INT4, files=FILES).to_json())
    value.update(changes)
    return json.dumps(value).encode()


def edited(path, new):
    """The sample as JSON with one value replaced; path is keys and indices."""
    value = json.loads(as_json())
    place = value
    for key in path[:-1]:
        place = place[key]
    if new is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return json.dumps(value).encode()


def test_a_manifest_comes_back_from_its_file(tmp_path):
    manifests = (
        manifest_of(INT4, files=FILES),
        manifest_of(
            dataclasses.replace(
                FP16, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192), has_qk_norm=True
            ),
            template=TemplateChoice("jinja", "tokenizer_config.json", "{{ '书生' }}\n"),
            tokenizer=TokenizerFacts(None, False, ()),
        ),
    )
    for manifest in manifests:
        write_manifest(tmp_path, manifest)
        assert read_manifest(tmp_path) == manifest
        assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_the_same_manifest_has_the_same_bytes():
    text = manifest_of(INT4, files=FILES).to_json()
    assert Manifest.from_json(text).to_json() == text
    assert text.isascii()
    assert text.startswith(b'{\n "format_version": 1,\n "name": "tiny-1.0",')
    assert text.endswith(b"}\n")


def test_files_add_up():
    assert manifest_of(INT4, files=FILES).size_bytes == 5
    assert manifest_of(INT4, files=FILES).is_sealed
    assert not manifest_of(INT4).is_sealed


def test_whole_numbers_do_for_real_ones():
    manifest = Manifest.from_json(edited(("model", "rope_theta"), 1000000))
    assert manifest.model.rope_theta == 1e6
    assert isinstance(manifest.model.rope_theta, float)


def test_a_future_version_asks_for_an_update():
    # Even when nothing else of it can be understood.
    text = json.dumps({"format_version": FORMAT_VERSION + 1, "news": True}).encode()
    with pytest.raises(PackageError, match=r"version 2 is newer than 1, .*; update turbojet"):
        Manifest.from_json(text)


@pytest.mark.parametrize("version", [0, -1])
def test_versions_that_never_were_are_refused(version):
    with pytest.raises(PackageError, match=f"version {version} does not exist"):
        Manifest.from_json(as_json(format_version=version))


@pytest.mark.parametrize("version", ["1", 1.0, True, None])
def test_a_version_must_be_a_whole_number(version):
    with pytest.raises(PackageError, match=r"no whole number as format_version"):
        Manifest.from_json(as_json(format_version=version))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("colour",), 1, "manifest.json has the unknown key 'colour'"),
        (("model", "colour"), 1, "manifest.json.model has the unknown key 'colour'"),
        (("template",), KeyError, "manifest.json lacks the key 'template'"),
        (("model", "has_qk_norm"), KeyError, "manifest.json.model lacks the key 'has_qk_norm'"),
        (("model",), [], "manifest.json.model is a list, expected an object"),
        (("files",), {}, "manifest.json.files is an object, expected a list"),
        (("files", 1), 7, r"manifest.json.files\[1\] is a whole number, expected an object"),
        (("name",), 7, "manifest.json.name is a whole number, expected a string"),
        (("name",), None, "manifest.json.name is null, expected a string"),
        (("model", "hidden_size"), True, "hidden_size is a boolean, expected a whole number"),
        (("model", "hidden_size"), 64.0, "hidden_size is a number, expected a whole number"),
        (("model", "has_qk_norm"), 1, "has_qk_norm is a whole number, expected a boolean"),
        (("model", "rope_theta"), "1", "rope_theta is a string, expected a number"),
        (("model", "weight_type"), "int3", "is 'int3', expected one of int4, fp16, bf16"),
        (("model", "weight_type"), [[]], "is a list, expected one of int4, fp16, bf16"),
        (("tokenizer", "bos_id"), "1", "bos_id is a string, expected a whole number"),
        (("tokenizer", "eos_ids"), [2, None], r"eos_ids\[1\] is null, expected a whole number"),
        (("tokenizer", "eos_ids"), [70], "special token 70, expected 0 to 69"),
        (("tokenizer", "bos_id"), -1, "special token -1, expected 0 to 69"),
        (("tokenizer", "bos_id"), None, "add_bos without a bos_id"),
        (("provenance", "source"), "\ud800", "source holds half a surrogate pair"),
        (("provenance", "calibration"), 1, "calibration is a whole number, expected an object"),
        (("quantization", "group_size"), 64, "group_size 64 in quantization, 32 in model"),
        (("model", "num_kv_heads"), 3, "num_attention_heads 2 is not a multiple"),
        (("sampling", "temperature"), -1, "sampling temperature is -1.0, expected 0 to 100"),
        (("sampling", "top_k"), -1, "sampling top_k is -1, expected 0 or more"),
        (("sampling", "top_p"), 0, "sampling top_p is 0.0, expected above 0, at most 1"),
        (("sampling", "min_p"), 1, "sampling min_p is 1.0, expected 0 to below 1"),
        (("sampling", "repetition_penalty"), 0, "repetition_penalty is 0.0, expected above 0"),
        (("model", "rope_scaling", "factor"), 0, "rope scaling factor is 0.0, expected above 0"),
        (("model", "rope_scaling", "kind"), "llama3", "original_max_position_embeddings 0"),
        (("name",), "../x", "package name '../x' is not"),
        (("target_boards",), ["Orin Nano"], "the target board 'Orin Nano'"),
        (("template", "name"), "", "the builtin chat template has no name"),
        (("template", "source"), "{{ x }}", "has 7 characters of source"),
        (("template", "kind"), "jinja", "has 0 characters of source"),
        (("files", 0, "path"), "c", "lists 'c' twice"),
        (("files", 0, "path"), "c/d", "lists 'c' as a file and as a folder"),
        (("files", 0, "path"), "/etc/passwd", "is absolute"),
        (("files", 0, "path"), "a/../../b", "climbs out of its folder"),
        (("files", 0, "path"), "manifest.json", "lists itself"),
        (("files", 0, "size_bytes"), -1, "a/b has size_bytes -1, expected 0 to 4398046511104"),
        (("files", 0, "size_bytes"), 2**43, "a/b has size_bytes 8796093022208, expected 0 to"),
        (("files", 0, "sha256"), SHA.upper(), "a/b has sha256 '0123456789ABCDEF"),
        (("files", 0, "sha256"), SHA + "\n", "expected 64 hex digits"),
    ],
)
def test_a_wrong_value_is_named(path, value, message):
    with pytest.raises(PackageError, match=message):
        Manifest.from_json(edited(path, value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "manifest.json is not JSON"),
        (b"[]", "manifest.json is a list, expected an object"),
        (b"null", "manifest.json is null, expected an object"),
        (b"\xff{}", "manifest.json is not JSON"),
        (b'{"a": 1} x', "manifest.json is not JSON"),
        (b'{"a": NaN}', "holds the number NaN, which JSON does not have"),
        (b'{"a": -Infinity}', "holds the number -Infinity, which JSON does not have"),
        (b'{"a": 1e999}', "holds the number 1e999, beyond 64 bits"),
        (b'{"a": 9223372036854775808}', "holds the integer 9223372036854775808, beyond 64 bits"),
        (b'{"a": ' + b"1" * 1_000_000 + b"}", "holds the integer 1{24}, beyond 64 bits"),
        (b'{"a": 1, "a": 2}', "repeats the key 'a'"),
        (b'{"a": ' + b"[" * 1_000_000, "nests too deep to be read"),
        (b'{"a": ' * 500_000, "nests too deep to be read"),
        (b" " * (MAX_MANIFEST_BYTES + 1), "has 4194305 bytes, expected at most 4194304"),
    ],
)
def test_texts_that_are_no_manifest_are_refused(text, message):
    with pytest.raises(PackageError, match=message):
        Manifest.from_json(text)


def test_nesting_that_python_can_just_parse_is_refused_too():
    for depth in (100, 300, 900, 950, 990, 1100):
        nested = b"[" * depth + b"]" * depth
        text = as_json().replace(b'"int4"', nested).replace(b'"c4"', nested)
        with pytest.raises(PackageError, match=r"expected one of int4|nests too deep"):
            Manifest.from_json(text)


def test_too_many_files_are_refused():
    files = tuple(FileEntry(f"f{i}", 0, SHA) for i in range(16385))
    with pytest.raises(PackageError, match=r"lists 16385 files, at most 16384"):
        manifest_of(INT4, files=files)


def test_a_template_beyond_reason_is_refused():
    with pytest.raises(PackageError, match=r"has 262145 characters, expected at most 262144"):
        TemplateChoice("jinja", "tokenizer_config.json", "x" * 262145)


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(PackageError, match=r"manifest.json cannot be read: No such file"):
        read_manifest(tmp_path)


def test_quantization_of_another_group_is_refused_when_made():
    with pytest.raises(PackageError, match=r"group_size 128 in quantization, 32 in model"):
        manifest_of(INT4, quantization=Quantization("awq", 4, 128))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def paths_of(value, prefix=()):
    yield prefix
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from paths_of(inner, (*prefix, key))


PATHS = [path for path in paths_of(json.loads(as_json())) if path]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PATHS), JSON)
def test_no_value_anywhere_raises_anything_else(path, value):
    try:
        manifest = Manifest.from_json(edited(path, value))
    except PackageError:
        return
    assert Manifest.from_json(manifest.to_json()) == manifest


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=6), st.integers(0, 1500), st.integers(0, 6))
def test_no_damaged_text_raises_anything_else(data, start, length):
    text = as_json()
    try:
        Manifest.from_json(text[:start] + data + text[start + length :])
    except PackageError:
        return
