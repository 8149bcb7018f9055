import pytest

from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format import names
from device_runtime.package_format.boards import BOARDS, parse_targets


def test_targets_come_in_the_order_of_the_table_and_once():
    boards = parse_targets("agx-orin-64gb, orin-nano-8gb,agx-orin-64gb")
    assert [board.name for board in boards] == ["orin-nano-8gb", "agx-orin-64gb"]


def test_all_means_every_board():
    assert parse_targets("all") == tuple(BOARDS.values())
    assert [board.name for board in BOARDS.values()] == list(BOARDS)


def test_usable_memory_of_an_8_gb_board():
    # 7/8 of 8 GiB is 7 GiB, less 1.5 GiB.
    assert BOARDS["orin-nano-8gb"].usable_bytes == 5905580032
    assert all(0 < b.usable_bytes < b.memory_bytes for b in BOARDS.values())


@pytest.mark.parametrize(
    ("sm", "names_of_sm"),
    [(72, "xavier"), (87, "orin"), (110, "thor")],
)
def test_compute_capabilities_by_family(sm, names_of_sm):
    for board in BOARDS.values():
        assert (board.sm == sm) == (names_of_sm in board.name)


def test_an_unknown_board_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="'orin-nano-8g'; did you mean orin-nano-8gb"):
        parse_targets("orin-nano-8g")
    with pytest.raises(UsageError, match=r"no board is called 'x'; known: .*thor, all"):
        parse_targets("thor,x")
    with pytest.raises(UsageError, match="no board is called ''"):
        parse_targets("")


def test_tensor_names():
    assert names.layer_tensor(3, names.W_QKV, 0, names.QWEIGHT) == (
        "layers.3.attention.w_qkv.0.qweight"
    )
    assert names.layer_tensor(0, names.FFN_NORM, None, names.WEIGHT) == "layers.0.ffn_norm.weight"
    assert names.kv_scale_tensor(7, 1) == "layers.7.past_kv_scale.1.weight"
    assert names.weight_path("norm.weight") == "triton_models/weights/norm.weight"
    assert names.tokenizer_path("tokenizer.json") == "triton_models/tokenizer/tokenizer.json"


@pytest.mark.parametrize("name", ["internlm2-chat-1_8b", "SmolLM2-135M-Instruct", "a", "1.0"])
def test_package_names_that_are_folder_names(name):
    assert names.check_package_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".hidden", "-rf", "a/b", "..", "a b", "名", "x" * 97, "a\n", "a\x00"]
)
def test_package_names_that_are_not(name):
    with pytest.raises(PackageError, match="is not 1 to 96 letters, digits"):
        names.check_package_name(name)


@pytest.mark.parametrize("path", ["a", "a/b.c", "kernels/sm_87/x.cubin", "书/生", "a..b/..c"])
def test_paths_that_stay_inside(path):
    assert names.check_relative_path(path) == path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "has 0 characters, expected 1 to 240"),
        ("a" * 241, "has 241 characters, expected 1 to 240"),
        ("/etc/passwd", "is absolute"),
        ("..", "climbs out of its folder"),
        ("a/../b", "climbs out of its folder"),
        ("a//b", "is not normalised"),
        ("a/", "is not normalised"),
        ("./a", "is not normalised"),
        ("a\\b", "holds a control character or a backslash"),
        ("a\nb", "holds a control character or a backslash"),
        ("a\x00", "holds a control character or a backslash"),
        ("a\ud800", "cannot be written as UTF-8"),
    ],
)
def test_paths_that_do_not(path, message):
    with pytest.raises(PackageError, match=message):
        names.check_relative_path(path)
