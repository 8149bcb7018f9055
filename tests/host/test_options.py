import pytest

from device_runtime.errors import UsageError
from host_tools.options import (
    CalibrateOptions,
    EvaluateOptions,
    QuantizeOptions,
    parse_devices,
)
from host_tools.package_options import BuildOptions


def test_defaults_are_those_of_lmdeploy_lite():
    assert CalibrateOptions() == CalibrateOptions("ptb", 128, 2048, "auto", 0)
    assert QuantizeOptions() == QuantizeOptions(4, 128, "awq", "auto")
    assert EvaluateOptions() == EvaluateOptions("wikitext2", 16, 1024, "auto")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: CalibrateOptions(num_samples=0), "calib-samples is 0, expected at least 1"),
        (lambda: CalibrateOptions(seed=2**63), "seed is 9223372036854775808, expected at most"),
        (lambda: CalibrateOptions(seqlen=0), "calib-seqlen is 0, expected at least 1"),
        (
            lambda: CalibrateOptions(num_samples=99999999, seqlen=256),
            "calib-samples 99999999 x calib-seqlen 256 are 25599999744 tokens, expected at most "
            "67108864; ask for fewer or shorter windows",
        ),
        (lambda: CalibrateOptions(device="tpu"), "device is 'tpu', choose one of auto, cpu, cuda"),
        (lambda: QuantizeOptions(w_bits=3), "w-bits is 3, only 4 can be quantized and run"),
        (lambda: QuantizeOptions(group_size=48), "w-group-size is 48, choose 128, 64 or 32"),
        (lambda: QuantizeOptions(method="gptq"), "method is 'gptq', choose one of awq, rtn"),
        (lambda: QuantizeOptions(device="tpu"), "device is 'tpu'"),
        (lambda: QuantizeOptions(devices=("0", "cpu")), "devices is '0,cpu', name the numbers of"),
        (lambda: CalibrateOptions(devices=("cuda:0",)), "devices is 'cuda:0', name the numbers of"),
        (lambda: BuildOptions(tp=0), "tp is 0, expected at least 1"),
        (lambda: BuildOptions(tp=3), "tp is 3, expected a power of two"),
        (lambda: EvaluateOptions(num_samples=0), "samples is 0, expected at least 1"),
        (lambda: EvaluateOptions(seqlen=1), "seqlen is 1, a prediction needs at least 2 tokens"),
        (lambda: EvaluateOptions(device="tpu"), "device is 'tpu'"),
    ],
)
def test_values_that_cannot_be_are_refused(make, sentence):
    with pytest.raises(UsageError, match=sentence):
        make()


def test_as_many_calibration_tokens_as_there_is_room_for_are_allowed():
    assert CalibrateOptions(num_samples=1 << 15, seqlen=1 << 11).num_samples == 1 << 15
    with pytest.raises(UsageError, match="calib-samples 32769 x calib-seqlen 2048 are 67110912"):
        CalibrateOptions(num_samples=(1 << 15) + 1, seqlen=1 << 11)


def test_devices_are_a_list_with_commas():
    assert parse_devices("") == ()
    assert parse_devices("0, 1") == ("0", "1")
    assert QuantizeOptions(devices=parse_devices("1,0")).devices == ("1", "0")
