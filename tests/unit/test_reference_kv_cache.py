"""What the KV cache stores and gives back, with numbers worked by hand."""

import dataclasses

import numpy as np
import pytest
from tiny_package import tiny_model

from device_runtime.backends.kv_format import KvFormat, kv_page_bytes
from device_runtime.backends.memory_plan import CacheRequest, MemorySurvey, plan_memory
from device_runtime.backends.reference.half import widen_finite
from device_runtime.backends.reference.kv_cache import (
    Fp16Cache,
    OnlineInt8Cache,
    StaticInt8Cache,
    quantize_online,
)
from device_runtime.package_format.kv_scale import KvScale

MODEL = tiny_model(
    num_hidden_layers=1,
    num_kv_heads=2,
    head_dim=4,
    num_attention_heads=2,
    weight_type="fp16",
    group_size=0,
)
RNG = np.random.default_rng(0)


def plan_for(kv_format, model=MODEL):
    request = CacheRequest(4.0, 64, 256, 1, 64, kv_format)
    return plan_memory(model, request, MemorySurvey("reference", 1 << 24, 0, 0))


def store_and_load(cache, kv, pages=(2, 0), layer=0):
    """Put ``kv [2, num_tokens, heads, D]`` into two pages and read it back, tokens first."""
    positions = np.arange(kv.shape[1], dtype=np.int32)
    table = np.array(pages, np.int32)
    cache.store(layer, table[positions // 64], positions % 64, kv.astype(np.float32))
    return cache.load(layer, table, kv.shape[1]).transpose(0, 2, 1, 3)


def test_all_finite_halves_widen_exactly() -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    assert np.array_equal(
        widen_finite(finite).view(np.uint32), finite.astype(np.float32).view(np.uint32)
    )


def test_fp16_pages_round_to_nearest_even_and_keep_their_order() -> None:
    kv = RNG.standard_normal((2, 100, 2, 4))
    found = store_and_load(Fp16Cache(MODEL, plan_for(KvFormat.FP16)), kv)
    assert np.array_equal(found, kv.astype(np.float32).astype(np.float16).astype(np.float32))


def test_neighbouring_pages_read_like_scattered_ones() -> None:
    kv = RNG.standard_normal((2, 130, 2, 4))
    caches = [OnlineInt8Cache(MODEL, plan_for(KvFormat.INT8_ONLINE)) for _ in range(2)]
    together = store_and_load(caches[0], kv, pages=(1, 2, 3))
    scattered = store_and_load(caches[1], kv, pages=(3, 0, 2))
    assert np.array_equal(together, scattered)


def test_static_codes_follow_the_specification() -> None:
    # scale 0.5, zp 1: 1.0 -> 128; 1.25 -> 128.5, even 128; 1.75 -> 129.5, even 130;
    # 100 -> 326, clamped 255; -100 -> -74, clamped 0. Read back (code - 128) / 2 + 1.
    cache = StaticInt8Cache(MODEL, plan_for(KvFormat.INT8_STATIC), [[KvScale(0.5, 1.0, 2.0, -1.0)]])
    keys = np.array([[1.0, 1.25, 1.75, 100.0], [-100.0, 0.0, 2.0, 1.0]])
    # Values: scale 2, zp -1: -1 -> 128; 0 -> 128.5, even 128; 2 -> 129.5, even 130.
    values = np.array([[-1.0, 0.0, 2.0, 3.0], [-1.0, -3.0, 1.0, 5.0]])
    found = store_and_load(cache, np.stack([keys[None], values[None]]))
    assert found[0, 0].tolist() == [[1.0, 1.0, 2.0, 64.5], [-63.0, 0.0, 2.0, 1.0]]
    assert found[1, 0].tolist() == [[-1.0, -1.0, 3.0, 3.0], [-1.0, -3.0, 1.0, 5.0]]
    assert cache._codes.dtype == np.uint8
    assert cache._codes[2, 0, 0, 0, 0].tolist() == [128, 128, 130, 255]


def test_each_rank_has_its_own_static_parameters() -> None:
    model = dataclasses.replace(MODEL, tensor_para_size=2)
    ranks = [KvScale(0.5, 0.0, 0.5, 0.0), KvScale(2.0, 0.0, 2.0, 0.0)]
    cache = StaticInt8Cache(model, plan_for(KvFormat.INT8_STATIC), [ranks])
    found = store_and_load(cache, np.full((2, 1, 2, 4), 3.0))
    # Head 0 belongs to rank 0: 3 is a multiple of 0.5. Head 1: 3 / 2 + 128 = 129.5, even 130.
    assert found[0, 0].tolist() == [[3.0] * 4, [4.0] * 4]


def test_online_codes_follow_the_specification() -> None:
    # min -1, max 1.55: scale fp16(2.55 / 255 = 0.01) = 0.0100021362, 1 / scale = 99.9786 as
    # fp16 is 100.0; (-1, -0.5, 0, 1.55) - (-1) times 100 is 0, 50, 100, 255.
    codes, parameters = quantize_online(np.array([-1.0, -0.5, 0.0, 1.55], np.float32))
    assert codes.tolist() == [0, 50, 100, 255]
    assert parameters.dtype == np.float16
    assert parameters.tolist() == [0.01000213623046875, -1.0]


def test_online_rounds_half_to_even() -> None:
    # max - min = 255 makes scale and inverse exactly 1.
    codes, _ = quantize_online(np.array([0.0, 0.5, 1.5, 255.0], np.float32))
    assert codes.tolist() == [0, 0, 2, 255]


def test_equal_values_give_scale_zero_code_zero_and_the_value_back() -> None:
    kv = np.full((2, 1, 2, 4), -0.375)
    cache = OnlineInt8Cache(MODEL, plan_for(KvFormat.INT8_ONLINE))
    assert np.array_equal(store_and_load(cache, kv), kv)
    codes, parameters = quantize_online(kv.astype(np.float32))
    assert not codes.any()
    assert parameters[0, 0, 0].tolist() == [0.0, -0.375]


def test_ranges_too_small_for_fp16_stay_finite_and_close() -> None:
    # 1e-4 / 255 is an fp16 subnormal whose inverse is beyond fp16.
    kv = np.array([0.0, 2e-5, 5e-5, 1e-4], np.float32)
    codes, parameters = quantize_online(kv)
    scale, zero = parameters.astype(np.float32)
    assert np.isfinite(parameters).all()
    assert np.abs(codes * scale + zero - kv).max() < 1e-4


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_online_error_is_at_most_half_a_step_and_roundings(head_dim) -> None:
    kv = RNG.standard_normal((500, head_dim)).astype(np.float32) * 3
    codes, parameters = quantize_online(kv)
    scale, zero = np.split(parameters.astype(np.float32), 2, axis=-1)
    # Half a step, plus 2^-11 of a step per code from the rounded inverse, twice (scale as well).
    assert np.abs(codes * scale + zero - kv).max() < (scale * (0.5 + 2 * 255 / 2048) + 0.005).max()


def test_a_page_takes_what_the_plan_says() -> None:
    for kv_format, cache in (
        (KvFormat.FP16, Fp16Cache(MODEL, plan_for(KvFormat.FP16))),
        (KvFormat.INT8_ONLINE, OnlineInt8Cache(MODEL, plan_for(KvFormat.INT8_ONLINE))),
    ):
        arrays = [value for value in vars(cache).values() if value.ndim == 6]
        total = sum(array.nbytes for array in arrays)
        assert total == 4 * kv_page_bytes(MODEL, 64, kv_format)
