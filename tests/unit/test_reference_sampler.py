"""The sampler: Philox against published vectors, filters by hand, frequencies by chi-square."""

import numpy as np
import pytest

from device_runtime.backends.reference import philox, sampler
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.errors import PackageError, RequestError

PLAIN = SamplingParams(temperature=1.0, top_k=0, top_p=1.0)


def params(**changes):
    return SamplingParams(**({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | changes))


def log_probabilities(*weights):
    return np.log(np.array(weights, np.float32))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Random123's kat_vectors for philox4x32-10: counter and key words low to high.
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected) -> None:
    counters = np.array(counter, np.uint32)[:, None]
    words = philox.philox4x32(counters, key[0] | key[1] << 32)
    assert tuple(int(word) for word in words[:, 0]) == expected


def test_a_uniform_is_23_bits_of_the_index_word_and_depends_on_nothing_else() -> None:
    # Counter 0 under key 0 gives 6627e8d5 e169c58d bc57ac4c 9b00dbd8; index 1 takes the second.
    one = philox.uniform(0, 0, np.array([1]))
    assert one.dtype == np.float32
    assert float(one[0]) == ((0xE169C58D >> 9) + 0.5) / 2**23
    all_of_them = philox.uniform(9, 5, np.arange(1000))
    some = np.array([3, 4, 5, 500, 999])
    assert np.array_equal(philox.uniform(9, 5, some), all_of_them[some])
    assert not np.array_equal(philox.uniform(9, 6, some), all_of_them[some])
    assert not np.array_equal(philox.uniform(8, 5, some), all_of_them[some])


def test_uniforms_never_reach_zero_or_one() -> None:
    extremes = np.array([0, 0xFFFFFFFF], np.uint32)
    scaled = ((extremes >> 9).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    assert scaled[0] == 2.0**-24
    assert scaled[1] == 1 - 2.0**-24
    noise = -np.log(-np.log(scaled))
    assert noise[0] == pytest.approx(-2.811, abs=0.01)
    assert noise[1] == pytest.approx(16.636, abs=0.01)
    assert noise[1] - noise[0] < sampler.MAX_GUMBEL_SPREAD


def test_uniforms_are_uniform() -> None:
    values = philox.uniform(123, 7, np.arange(200_000))
    counts = np.histogram(values, bins=64, range=(0, 1))[0]
    # chi-square with 63 degrees of freedom is below 103.4 in 99.9 of 100 cases.
    assert float(((counts - 3125) ** 2 / 3125).sum()) < 103.4


def test_temperature_zero_takes_the_first_of_the_largest() -> None:
    logits = np.array([1, 5, 5, 2], np.float32)
    assert sampler.sample(logits, params(temperature=0.0), 0) == 1


def test_the_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens() -> None:
    logits = np.array([4.0, -4.0, 3.0, -1.0], np.float32)
    seen = np.array([True, True, False, False])
    assert sampler.penalize(logits, seen, 2.0).tolist() == [2.0, -8.0, 3.0, -1.0]
    assert logits.tolist() == [4.0, -4.0, 3.0, -1.0]
    greedy = params(temperature=0.0, repetition_penalty=2.0)
    assert sampler.sample(logits, greedy, 0, seen) == 2


def kept(logits, **changes):
    scaled = np.asarray(logits, np.float32)
    return sampler.survivors(scaled - scaled.max(), params(**changes)).tolist()


def test_top_k_keeps_the_largest_and_all_that_tie_with_the_last() -> None:
    assert kept([1, 4, 3, 2], top_k=2) == [1, 2]
    assert kept([1, 3, 3, 4, 3], top_k=2) == [1, 2, 3, 4]
    assert kept([1, 2], top_k=5) == [0, 1]


def test_top_p_keeps_the_fewest_whose_sum_reaches_it() -> None:
    logits = log_probabilities(0.1, 0.5, 0.15, 0.25)
    assert kept(logits, top_p=0.49) == [1]
    assert kept(logits, top_p=0.51) == [1, 3]
    assert kept(logits, top_p=0.76) == [1, 2, 3]
    assert kept(logits, top_p=0.95) == [0, 1, 2, 3]
    assert kept(log_probabilities(0.4, 0.2, 0.2, 0.2), top_p=0.5) == [0, 1, 2, 3]


def test_top_p_works_on_what_top_k_left_renormalised() -> None:
    logits = log_probabilities(0.1, 0.5, 0.15, 0.25)
    # Top 2 are 0.5 and 0.25, renormalised 2/3 and 1/3: 0.6 needs one, 0.7 needs both.
    assert kept(logits, top_k=2, top_p=0.6) == [1]
    assert kept(logits, top_k=2, top_p=0.7) == [1, 3]


def test_min_p_keeps_a_share_of_the_largest() -> None:
    logits = log_probabilities(0.1, 0.5, 0.15, 0.25)
    assert kept(logits, min_p=0.25) == [1, 2, 3]  # at least 0.125
    assert kept(logits, min_p=0.6) == [1]


def test_temperature_acts_before_the_filters() -> None:
    logits = log_probabilities(0.5, 0.3, 0.2)
    # At temperature 0.25 the weights go as p^4: 0.0625, 0.0081, 0.0016, so 0.8 needs one.
    drawn = {
        sampler.sample(logits, params(temperature=0.25, top_p=0.8, seed=s), 0) for s in range(200)
    }
    assert drawn == {0}


def test_what_lies_too_far_below_the_best_cannot_be_drawn() -> None:
    assert kept([0.0, -19.4, -19.6]) == [0, 1]


def test_a_seed_and_a_position_decide_the_token() -> None:
    logits = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    first = [sampler.sample(logits, params(seed=5), position) for position in range(40)]
    again = [sampler.sample(logits, params(seed=5), position) for position in range(40)]
    other = [sampler.sample(logits, params(seed=6), position) for position in range(40)]
    assert first == again
    assert first != other
    assert len(set(first)) > 10


def test_a_filter_that_cuts_nothing_that_is_drawn_changes_no_draw() -> None:
    logits = np.random.default_rng(1).standard_normal(300).astype(np.float32)
    free = [sampler.sample(logits, params(), position) for position in range(200)]
    cut = [sampler.sample(logits, params(top_k=150), position) for position in range(200)]
    agreeing = [a == b for a, b in zip(free, cut, strict=True)]
    # The noise belongs to the index: only draws outside the top 150 may differ.
    best = set(np.argsort(-logits)[:150].tolist())
    assert all(same for same, token in zip(agreeing, free, strict=True) if token in best)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_k": 3}, [4 / 9, 3 / 9, 2 / 9, 0.0]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0.0, 0.0]),
        ({"min_p": 0.4}, [4 / 9, 3 / 9, 2 / 9, 0.0]),
    ],
)
def test_frequencies_pass_a_chi_square_test(changes, expected) -> None:
    logits = log_probabilities(0.4, 0.3, 0.2, 0.1)
    draws = 4000
    setting = params(seed=2024, **changes)
    counts = np.bincount(
        [sampler.sample(logits, setting, position) for position in range(draws)], minlength=4
    )
    wanted = np.array(expected) * draws
    assert counts[wanted == 0].sum() == 0
    possible = wanted > 0
    statistic = ((counts - wanted)[possible] ** 2 / wanted[possible]).sum()
    # The 99.9 % point of chi-square with 1, 2 and 3 degrees of freedom.
    assert statistic < {2: 10.83, 3: 13.82, 4: 16.27}[int(possible.sum())]


def test_tiny_temperatures_do_not_overflow() -> None:
    logits = np.array([-3.0e4, 3.0e4, 2.9e4], np.float32)
    assert sampler.sample(logits, params(temperature=1e-30), 0) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad) -> None:
    logits = np.array([0.0, bad, 1.0], np.float32)
    with pytest.raises(PackageError, match="logits at position 17 hold"):
        sampler.sample(logits, PLAIN, 17)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected 0 to 100"),
        ({"top_k": -1}, "top_k is -1, expected 0 or more"),
        ({"top_p": 0.0}, "top_p is 0.0, expected above 0"),
        ({"min_p": 1.0}, "min_p is 1.0, expected 0 to below 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
    ],
)
def test_settings_outside_their_range_are_refused(changes, message) -> None:
    with pytest.raises(RequestError, match=message):
        params(**changes)
