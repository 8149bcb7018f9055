import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from device_runtime.package_format import bfloat16, fusion, rotary


def test_halves_become_adjacent_pairs_in_every_head():
    # Two heads of 8: new[h*8 + 2i + j] = old[h*8 + 4j + i].
    columns = np.arange(16)
    expected = [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert rotary.to_pairs(columns, 8).tolist() == expected


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_pairs_follow_the_formula_on_the_last_axis(head_dim, dtype):
    rng = np.random.default_rng(head_dim)
    columns = rng.integers(0, 15, (3, 2 * head_dim)).astype(dtype)
    pairs = rotary.to_pairs(columns, head_dim)
    for head in range(2):
        for i in range(head_dim // 2):
            for j in range(2):
                new = columns[:, head * head_dim + j * head_dim // 2 + i]
                assert np.array_equal(pairs[:, head * head_dim + 2 * i + j], new)
    assert pairs.dtype == dtype
    assert pairs.flags.c_contiguous


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 3))
def test_pairs_and_halves_undo_each_other(num_heads, half, rows):
    columns = np.random.default_rng(half).permutation(rows * num_heads * 2 * half)
    columns = columns.reshape(rows, -1)
    head_dim = 2 * half
    assert np.array_equal(rotary.to_halves(rotary.to_pairs(columns, head_dim), head_dim), columns)
    assert np.array_equal(rotary.to_pairs(rotary.to_halves(columns, head_dim), head_dim), columns)


def test_reordering_leaves_its_input_alone():
    columns = np.arange(8)
    rotary.to_pairs(columns, 8)[0] = 99
    rotary.to_pairs(columns, 2)[0] = 99  # with one pair the order does not change
    assert columns.tolist() == list(range(8))


@pytest.mark.parametrize(("columns", "head_dim"), [(8, 3), (8, 0), (12, 8), (8, -2)])
def test_columns_that_are_not_whole_heads_are_refused(columns, head_dim):
    for reorder in (rotary.to_pairs, rotary.to_halves):
        with pytest.raises(ValueError, match=f"{columns} columns are not whole heads"):
            reorder(np.zeros(columns), head_dim)


def test_each_rank_gets_its_q_then_k_then_v():
    # 4 query heads and 2 kv heads of 2 columns on 2 ranks.
    q, k, v = np.arange(8), np.arange(10, 14), np.arange(20, 24)
    parts = fusion.fuse_qkv(q, k, v, ranks=2)
    assert [part.tolist() for part in parts] == [
        [0, 1, 2, 3, 10, 11, 20, 21],
        [4, 5, 6, 7, 12, 13, 22, 23],
    ]


@settings(max_examples=50, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 4]),
    kv_heads_per_rank=st.integers(1, 3),
    queries_per_kv=st.integers(1, 4),
    head_dim=st.sampled_from([2, 6, 64]),
    lead=hnp.array_shapes(max_dims=1, max_side=3),
)
def test_fused_columns_come_apart_again(ranks, kv_heads_per_rank, queries_per_kv, head_dim, lead):
    kv_heads = ranks * kv_heads_per_rank
    heads = kv_heads * queries_per_kv
    rng = np.random.default_rng(0)
    q, k, v = (rng.integers(0, 99, (*lead, n * head_dim)) for n in (heads, kv_heads, kv_heads))
    parts = fusion.fuse_qkv(q, k, v, ranks)
    assert all(part.shape[-1] == (heads + 2 * kv_heads) * head_dim // ranks for part in parts)
    for whole, again in zip(
        (q, k, v), fusion.split_qkv(parts, heads, kv_heads, head_dim), strict=True
    ):
        assert np.array_equal(whole, again)


def test_heads_that_do_not_split_over_the_ranks_are_refused():
    with pytest.raises(ValueError, match="6 columns do not split evenly over 4 ranks"):
        fusion.fuse_qkv(np.zeros(8), np.zeros(6), np.zeros(6), ranks=4)
    with pytest.raises(ValueError, match="over 0 ranks"):
        fusion.split_columns(np.zeros(8), 0)


def test_a_fused_part_of_another_width_is_refused():
    parts = [np.zeros(8), np.zeros(7)]
    with pytest.raises(ValueError, match=r"rank 1 has 7 fused columns, expected 4 \+ 2 x 2"):
        fusion.split_qkv(parts, num_heads=4, num_kv_heads=2, head_dim=2)
    with pytest.raises(ValueError, match="6 query columns do not split evenly over 4 ranks"):
        fusion.split_qkv(parts * 2, num_heads=3, num_kv_heads=4, head_dim=2)


def test_gate_and_up_alternate_gate_first():
    fused = fusion.fuse_w13(np.array([[1, 2]]), np.array([[10, 20]]))
    assert fused.tolist() == [[1, 10, 2, 20]]


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.just(8))), st.sampled_from([1, 2, 4]))
def test_interleaving_and_splitting_commute(w1, ranks):
    w3 = w1[:, ::-1]
    whole = fusion.fuse_w13(w1, w3)
    each = [
        fusion.fuse_w13(a, b)
        for a, b in zip(
            fusion.split_columns(w1, ranks), fusion.split_columns(w3, ranks), strict=True
        )
    ]
    assert np.array_equal(fusion.join_columns(each), whole)
    first, second = fusion.split_w13(whole)
    assert np.array_equal(first, w1)
    assert np.array_equal(second, w3)


def test_gate_and_up_must_be_alike():
    with pytest.raises(ValueError, match="differ in shape"):
        fusion.fuse_w13(np.zeros((2, 4)), np.zeros((2, 6)))
    with pytest.raises(ValueError, match="5 columns do not split evenly over 2"):
        fusion.split_w13(np.zeros((2, 5)))


def test_rows_and_columns_split_and_join():
    matrix = np.arange(24).reshape(4, 6)
    columns = fusion.split_columns(matrix, 2)
    assert columns[1].tolist() == [[3, 4, 5], [9, 10, 11], [15, 16, 17], [21, 22, 23]]
    assert np.array_equal(fusion.join_columns(columns), matrix)
    rows = fusion.split_rows(matrix, 2)
    assert rows[1].tolist() == [list(range(12, 18)), list(range(18, 24))]
    assert np.array_equal(fusion.join_rows(rows), matrix)
    assert fusion.join_rows([matrix]) is matrix
    with pytest.raises(ValueError, match="4 rows do not split evenly over 3 ranks"):
        fusion.split_rows(matrix, 3)


def test_bfloat16_rounds_to_nearest_even():
    # 1 + 2^-8 is half way between 0x3F80 (even) and 0x3F81; 1 + 3 * 2^-8 between 0x3F81 and
    # 0x3F82 (even); 3.4e38 rounds up to infinity, 0x7F80.
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -2.5, 3.4e38, np.inf, 0.0], np.float32)
    bits = bfloat16.from_float32(values)
    assert [hex(b) for b in bits] == [
        "0x3f80",
        "0x3f80",
        "0x3f82",
        "0xc020",
        "0x7f80",
        "0x7f80",
        "0x0",
    ]


def test_bfloat16_keeps_nan_apart_from_infinity():
    # A NaN whose payload sits in the dropped half must not become an infinity.
    values = np.array([0x7F800001, 0xFFC00000, 0x7FFFFFFF], np.uint32).view(np.float32)
    widened = bfloat16.to_float32(bfloat16.from_float32(values))
    assert np.isnan(widened).all()
    assert np.signbit(widened).tolist() == [False, True, False]


def test_every_bfloat16_survives_widening():
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    is_nan = (bits & 0x7FFF) > 0x7F80
    again = bfloat16.from_float32(bfloat16.to_float32(bits))
    assert np.array_equal(again[~is_nan], bits[~is_nan])
    assert np.array_equal(again[is_nan], bits[is_nan] | 0x40)
