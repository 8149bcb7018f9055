"""Tokens to text and back: special tokens, stop strings, characters cut by tokens."""

import json
import random

import pytest
from tiny_package import SPECIAL, make_package, write_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from device_runtime.engine.detokenizer import Detokenizer
from device_runtime.engine.stop_strings import StopStrings
from device_runtime.engine.tokenizer import Tokenizer
from device_runtime.errors import PackageError
from device_runtime.package_format import names
from device_runtime.package_format.manifest import TokenizerFacts
from device_runtime.package_format.package import open_package
from device_runtime.templates.message import Segment

FACTS = TokenizerFacts(bos_id=0, add_bos=False, eos_ids=(2,))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer((folder / names.TOKENIZER_JSON).read_text(encoding="utf-8"), FACTS)


def sentencepiece_like(scheme="first", *, prepend_normalizer=False):
    """A Llama-style tokenizer: blanks are ▁, unknown characters are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁b", "ab", "▁ab", "[", "]", "|", "<", ">"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁", "ab"), ("▁a", "b")]
    fast = FastTokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    if prepend_normalizer:
        fast.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>")]
    )
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return fast


def markup(text):
    return Segment(text, True)


def words(text):
    return Segment(text, False)


def test_markup_has_special_tokens_and_text_that_spells_them_has_letters(byte_level) -> None:
    ids = byte_level.encode_segments(
        (markup("<|im_start|>"), words("<|im_end|>"), markup("<|im_end|>"))
    )
    assert ids[0] == 1
    assert ids[-1] == 2
    assert 2 not in ids[:-1]
    assert byte_level.decode(ids) == "<|im_end|>"


def test_ordinary_prompts_are_encoded_as_one_text(byte_level) -> None:
    # "ab" is one token although "a" ends one segment and "b" starts the next.
    joined = byte_level.encode_segments((markup("<|im_start|>a"), words("b")))
    assert joined == byte_level.encode_segments((markup("<|im_start|>ab"),))
    assert len(joined) == 2
    # The same where a spelled special token forces encoding in runs.
    apart = byte_level.encode_segments(
        (markup("<|im_start|>a"), words("b<|im_end|>a"), markup("b"))
    )
    assert apart[:2] == joined
    assert apart[-1] == joined[-1]
    assert byte_level.decode(apart) == "ab<|im_end|>ab"


def test_a_spelling_that_crosses_from_text_into_markup_is_no_special_token(byte_level) -> None:
    ids = byte_level.encode_segments((words("x<|im_"), markup("end|>y<|im_end|>")))
    assert ids.count(2) == 1
    assert ids[-1] == 2
    assert byte_level.decode(ids) == "x<|im_end|>y"


def test_plain_text_never_has_special_tokens(byte_level) -> None:
    assert not {0, 1, 2} & set(byte_level.encode("".join(SPECIAL) * 3))


def test_any_mixture_of_spellings_and_pieces_of_them_stays_text(byte_level) -> None:
    rng = random.Random(3)
    pieces = ["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "<", "|>", "a", " ", "\n", "é", "中"]
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 8)))
        ids = byte_level.encode_segments(
            (markup("<|im_start|>u\n"), words(text), markup("<|im_end|>"))
        )
        assert ids[0] == 1 and ids[-1] == 2
        assert not {0, 1, 2} & set(ids[1:-1])
        assert byte_level.decode(ids) == "u\n" + text


def test_bos_is_added_where_the_facts_say_so_and_the_template_does_not() -> None:
    definition = sentencepiece_like().to_str()
    wants = Tokenizer(definition, TokenizerFacts(1, add_bos=True, eos_ids=(2,)))
    lacks = Tokenizer(definition, TokenizerFacts(1, add_bos=False, eos_ids=(2,)))
    segments = (words("ab"),)
    plain = lacks.encode_segments(segments)
    assert 1 not in plain  # the post-processor's own bos is never taken
    assert wants.encode_prompt(segments, writes_bos=False) == [1, *plain]
    assert wants.encode_prompt(segments, writes_bos=True) == plain
    assert lacks.encode_prompt(segments, writes_bos=False) == plain
    assert wants.encode("ab", add_bos=True) == [1, *plain]


@pytest.mark.parametrize("stray", ["", "</s>"])
def test_a_blank_is_put_first_only_at_the_start_of_a_sequence(stray) -> None:
    tokenizer = Tokenizer(sentencepiece_like("first").to_str(), FACTS)
    start = tokenizer.encode_segments((words("ab" + stray),))
    later = tokenizer.encode_segments((words("ab" + stray),), is_start=False)
    assert start[0] == tokenizer.token_id("▁ab")
    assert later[0] == tokenizer.token_id("ab")
    after = tokenizer.encode_segments((markup("<s>"), words("ab" + stray)))
    assert after[:2] == [1, tokenizer.token_id("ab")]


def test_a_normalizer_that_puts_blanks_before_every_run_is_followed() -> None:
    tokenizer = Tokenizer(sentencepiece_like(prepend_normalizer=True).to_str(), FACTS)
    blank_ab = tokenizer.token_id("▁ab")
    assert tokenizer.encode_segments((markup("<s>"), words("ab"))) == [1, blank_ab]
    assert tokenizer.encode_segments((markup("<s>"), words("ab</s>")))[:2] == [1, blank_ab]


def test_a_tokenizer_that_cuts_or_pads_does_neither_here() -> None:
    fast = sentencepiece_like()
    fast.enable_truncation(2)
    fast.enable_padding(length=8)
    assert len(Tokenizer(fast.to_str(), FACTS).encode("abcdefgh")) > 4


def test_token_ids_of_words(byte_level) -> None:
    assert byte_level.token_id("<|im_end|>") == 2
    assert byte_level.token_id("ab") is not None
    assert byte_level.token_id("no such token") is None


def test_a_plain_workspace_takes_its_facts_from_config_ini(tmp_path) -> None:
    made = make_package(tmp_path / "p", has_manifest=False)
    tokenizer = Tokenizer.open(open_package(made.root))
    assert tokenizer.facts == TokenizerFacts(bos_id=0, add_bos=False, eos_ids=(2,))
    path = made.root / names.tokenizer_path(names.TOKENIZER_JSON)
    sentencepiece_like().save(str(path))
    config = made.root / names.WEIGHTS_DIR / names.CONFIG_INI
    config.write_text(config.read_text().replace("start_id = 0", "start_id = 1"))
    assert Tokenizer.open(open_package(made.root)).facts.add_bos


def test_a_missing_tokenizer_is_a_package_error(tmp_path) -> None:
    made = make_package(tmp_path / "p", has_manifest=False)
    path = made.root / names.tokenizer_path(names.TOKENIZER_JSON)
    path.unlink()
    with pytest.raises(PackageError, match=r"tokenizer.json is missing, and so are tokenizer"):
        Tokenizer.open(open_package(made.root))
    path.write_bytes(b"\xff")
    with pytest.raises(PackageError, match=r"tokenizer.json cannot be read"):
        Tokenizer.open(open_package(made.root))
    with open(path, "wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(PackageError, match="has 268435457 bytes, expected at most 268435456"):
        Tokenizer.open(open_package(made.root))


@pytest.mark.parametrize("definition", ["", "[]", "{}", '{"model": {"type": "BPE"}}', "null"])
def test_a_text_that_is_no_tokenizer_is_a_package_error(definition) -> None:
    with pytest.raises(PackageError, match=r"tokenizer.json is not a tokenizer: \S"):
        Tokenizer(definition, FACTS)


def test_a_tokenizer_with_impossible_merges_is_a_package_error(byte_level) -> None:
    value = json.loads(byte_level._definition)
    value["model"]["merges"] = [["no", "such"]]
    with pytest.raises(PackageError, match=r"is not a tokenizer"):
        Tokenizer(json.dumps(value), FACTS)


TEXTS = [
    "plain words",
    "naïve café, 中文字符, кириллица",
    "🙂🙃 family: 👨‍👩‍👧‍👦 flags 🇫🇷",
    "combining e\u0301 and \u200f marks",
    "\ufffd is a character too \ufffd\ufffd end\ufffd",
    " leading and trailing ",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_streamed_text_is_the_text_and_no_piece_is_half_a_character(byte_level, kind, text) -> None:
    tokenizer = byte_level
    if kind == "sentencepiece":
        tokenizer = Tokenizer(sentencepiece_like("never").to_str(), FACTS)
    prompt = tokenizer.encode("ab ab")
    ids = tokenizer.encode(text * 5)
    stream = Detokenizer(tokenizer.decode, prompt)
    pieces = [stream.push(token_id) for token_id in ids]
    tail = stream.flush()
    assert "".join(pieces) + tail == text * 5
    if "\ufffd" not in text:
        assert tail == ""
        assert "\ufffd" not in "".join(pieces)
    assert len(stream._window) <= 45


def test_bytes_that_never_become_a_character_come_out_as_replacements(byte_level) -> None:
    euro = byte_level.encode("€")  # e2 82 ac
    stream = Detokenizer(byte_level.decode, [])
    assert stream.push(euro[0]) == ""
    assert stream.push(euro[1]) == ""
    assert stream.flush() == "\ufffd"
    stream = Detokenizer(byte_level.decode, [])
    letter = byte_level.encode("x")[0]
    assert [stream.push(i) for i in (euro[0], letter)] == ["", "\ufffdx"]


def test_replacement_characters_do_not_hold_back_the_text_for_ever(byte_level) -> None:
    lone = byte_level.encode("€")[1]
    stream = Detokenizer(byte_level.decode, [])
    pieces = [stream.push(lone) for _ in range(100)]
    assert len("".join(pieces)) == 96
    assert len("".join(pieces) + stream.flush()) == 100


@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_a_prompt_of_byte_tokens_does_not_spoil_the_answer(count) -> None:
    tokenizer = Tokenizer(sentencepiece_like("never").to_str(), FACTS)
    stream = Detokenizer(tokenizer.decode, tokenizer.encode("中" * count))
    assert "".join(stream.push(i) for i in tokenizer.encode("文字" * 30)) == "文字" * 30


def test_the_blank_after_the_prompt_is_kept() -> None:
    tokenizer = Tokenizer(sentencepiece_like("first").to_str(), FACTS)
    blank_ab = tokenizer.token_id("▁ab")
    stream = Detokenizer(tokenizer.decode, tokenizer.encode("ab"))
    assert stream.push(blank_ab) == " ab"
    assert stream.push(blank_ab) == " ab"
    alone = Detokenizer(tokenizer.decode, [])
    assert alone.push(blank_ab) == "ab"  # a text does not start with a blank


def push_all(stops, pieces):
    matcher = StopStrings(tuple(stops))
    out = [matcher.push(piece) for piece in pieces]
    return out, matcher


def test_a_stop_string_inside_a_piece_ends_the_text_before_it() -> None:
    out, matcher = push_all(["END"], ["some ENDing", "more"])
    assert out == ["some ", ""]
    assert matcher.found == "END"
    assert matcher.flush() == ""


def test_a_stop_string_across_pieces_is_held_back_until_decided() -> None:
    out, matcher = push_all(["END"], ["aE", "N", "D!"])
    assert out == ["a", "", ""]
    assert matcher.found == "END"


def test_what_turns_out_not_to_be_a_stop_string_comes_through() -> None:
    out, matcher = push_all(["END"], ["aE", "N", "x", "E"])
    assert out == ["a", "", "ENx", ""]
    assert matcher.flush() == "E"
    assert matcher.found is None


def test_an_end_that_restarts_the_stop_string_is_seen() -> None:
    out, matcher = push_all(["aab"], ["aa", "a", "b"])
    assert out == ["", "a", ""]
    assert matcher.found == "aab"


def test_of_several_stop_strings_the_one_complete_first_wins() -> None:
    out, matcher = push_all(["xyz", "b"], ["a b xyz"])
    assert out == ["a "]
    assert matcher.found == "b"
    out, matcher = push_all(["abcd", "bc"], ["abcd"])
    assert out == ["a"]
    assert matcher.found == "bc"


def test_without_stop_strings_everything_passes() -> None:
    assert push_all([], ["a", "b"])[0] == ["a", "b"]


def test_any_cutting_of_a_text_gives_the_same_result() -> None:
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choices("abE N", k=20))
        stops = ["".join(rng.choices("abEN", k=rng.randrange(1, 4))) for _ in range(2)]
        # The string that is complete first ends the text; of two that are, the longer.
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        expected = text
        if ends:
            cut = text[: min(ends)]
            expected = cut[: min(cut.find(stop) for stop in stops if cut.endswith(stop))]
        pieces, rest = [], text
        while rest:
            size = rng.randrange(1, 6)
            pieces.append(rest[:size])
            rest = rest[size:]
        out, matcher = push_all(stops, pieces)
        assert "".join(out) + matcher.flush() == expected
