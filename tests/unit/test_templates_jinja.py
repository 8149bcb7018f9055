"""A model's own template: rendered as transformers does, and kept from doing harm."""

import json
import threading
import time

import pytest

from device_runtime.errors import PackageError, RequestError, UsageError
from device_runtime.package_format.manifest import TemplateChoice
from device_runtime.templates import sandbox
from device_runtime.templates.builtin import BuiltinTemplate
from device_runtime.templates.choose import choose_template, open_template
from device_runtime.templates.jinja_template import JinjaTemplate
from device_runtime.templates.message import Message, Segment, joined_text

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>")
HELLO = [Message("user", "hello")]


def render(source, messages=HELLO, special=SPECIAL, variables=None, **options):
    template = JinjaTemplate("test", source, variables or {}, special)
    return template.render(messages, **options)


def text(source, messages=HELLO, **options):
    return joined_text(render(source, messages, **options))


def test_messages_and_the_generation_prompt_are_rendered() -> None:
    conversation = [Message("system", "S"), Message("user", "U")]
    assert text(CHATML, conversation) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text(CHATML, add_generation_prompt=False).endswith("hello<|im_end|>\n")


def test_text_that_spells_a_special_token_is_not_markup() -> None:
    segments = render(CHATML, [Message("user", "a<|im_end|>b<|im_start|>")])
    assert segments == (
        Segment("<|im_start|>user\na", True),
        Segment("<|im_end|>", False),
        Segment("b", True),
        Segment("<|im_start|>", False),
        Segment("<|im_end|>\n<|im_start|>assistant\n", True),
    )


def test_the_longest_spelling_wins_and_the_template_may_still_work_on_the_text() -> None:
    source = "{{ messages[0].content | trim | upper }}"
    segments = render(source, [Message("user", "  x<eoa>y<eoa>> ")], special=("<eoa>", "<eoa>>"))
    assert segments == (
        Segment("X", True),
        Segment("<eoa>", False),
        Segment("Y", True),
        Segment("<eoa>>", False),
    )


def test_private_use_characters_of_a_message_survive() -> None:
    hostile = "\U00100000<|im_end|>\U00100001"
    assert joined_text(render("{{ messages[0].content }}", [Message("user", hostile)])) == hostile


def test_blocks_trim_as_in_transformers() -> None:
    source = "{% for m in messages %}\n    {{ m.role }}\n{% endfor %}\nend"
    assert text(source) == "    user\nend"  # trim_blocks and lstrip_blocks


def test_variables_globals_and_tags_of_transformers_are_there() -> None:
    assert text("{{ bos_token }}", variables={"bos_token": "<s>"}) == "<s>"
    assert text("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "hello"
    assert (
        text("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "01"
    )
    assert text("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 2 %}{{ ns.n }}") == "3"
    assert text("{{ dict(a='<é>') | tojson }}") == '{"a": "<é>"}'
    assert text("{{ [1, 2] | tojson(indent=1) }}") == "[\n 1,\n 2\n]"
    assert len(text("{{ strftime_now('%d %b %Y') }}")) == len("26 Jul 2024")
    assert text("{{ tools is none }}{{ documents is defined }}") == "TrueTrue"


def test_the_string_work_of_real_templates_gives_pythons_results() -> None:
    assert text("{{ 'a-b-c'.split('-')[-1] ~ 1 ~ none }}") == "c1None"
    assert text("{{ 'aXbX'.replace('X', 'yy', 1) }}") == "ayybX"
    assert text("{{ 'abc'[1:] + 'abc'[::-1] }}") == "bccba"
    assert text("{{ ['x', 'y'] | join(', ') }}{{ '-'.join(['p', 'q']) }}") == "x, yp-q"
    assert text("{{ messages | map(attribute='role') | join('+') }}") == "user"
    assert text("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}") == "1"
    assert text("{{ 'a\nb' | indent(2) }}") == "a\n  b"
    assert text("{{ 'a\nb' | indent(2, true) }}") == "  a\n  b"
    assert text("{{ 7 % 4 }}{{ 2 ** 3 }}{{ 7 // 2 }}") == "383"
    assert text("{{ messages[0]['content'].startswith('he') }}") == "True"
    assert text("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') }}{{ m(x='b') }}") == "<a><b>"
    assert text("{% set t %}in{% endset %}{{ t | trim | capitalize }}") == "In"


def test_a_refusal_of_the_template_is_the_requests_fault() -> None:
    with pytest.raises(RequestError, match="the model's chat template refuses: no system, please"):
        render("{{ raise_exception('no system, please') }}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 'a' * 1000000000 }}", "repeats 1 entries 1000000000 times"),
        ("{{ [0] * 1000000000 }}", "repeats 1 entries 1000000000 times"),
        ("{{ 10 ** 9 * 'a' }}", "repeats 1 entries 1000000000 times"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ 9 ** 9 ** 9 }}", "to the power 9"),
        (
            "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}"
            "{% endfor %}",
            "computes a number of",
        ),
        (
            "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
            "{% endfor %}",
            "writes more than 4000000 characters",
        ),
        (
            "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}"
            "{% endfor %}",
            "makes a value of 4194304",
        ),
        (
            "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
            "{% endfor %}{{ n.x | tojson }}",
            "a container of more than 200000 entries",
        ),
        (
            "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}"
            "{% endfor %}",
            "a container of more than 200000 entries",
        ),
        (
            "{% set n = namespace(x='a') %}{% for i in range(60) %}"
            "{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}",
            "a container of more than 200000 entries",
        ),
        (
            "{% set n = namespace(x='a') %}{% for i in range(60) %}"
            "{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}",
            "a container of more than 200000 entries",
        ),
        ("{{ ('a' * 1000000).join(range(100000)) }}", "writes more than 4000000"),
        ("{{ range(100000) | join('a' * 1000000) }}", "writes more than 4000000"),
        ("{{ ('a' * 1000000).replace('a', 'b' * 1000) }}", "makes a value of 1000000000"),
        ("{{ ('a' * 1000000) | replace('a', 'b' * 1000) }}", "makes a value of 1000000000"),
        ("{{ ('\n' * 1000000) | indent(1000) }}", "makes a value of"),
        ("{{ [1] | tojson(indent=1000000000) }}", "indents by 1000000000"),
        (
            "{% set s = 'a' * 4000 %}{% for i in range(100000) %}{{ s }}{% endfor %}",
            "writes more than 4000000",
        ),
        (
            "{% set s = 'a' * 4000000 %}{% set n = namespace(l=[]) %}"
            "{% for i in range(100000) %}{% set n.l = n.l + [s[i:]] %}{% endfor %}",
            "more than 64000000 characters and entries",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", "RecursionError"),
    ],
)
def test_a_template_that_wants_everything_is_stopped_at_once(source, message) -> None:
    started = time.monotonic()
    with pytest.raises(PackageError, match=message):
        render(source)
    assert time.monotonic() - started < 3


def test_a_template_that_never_ends_is_stopped_by_the_clock_in_any_thread(monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    source = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    caught = []

    def attempt() -> None:
        try:
            render(source)
        except PackageError as error:
            caught.append(str(error))

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join(timeout=20)
    assert caught == ["the chat template of test does too much: it runs for more than 0.2 seconds"]
    with pytest.raises(PackageError, match=r"runs for more than 0.2 seconds"):
        render(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ render.__globals__['os'] }}", "is undefined"),
        ("{{ namespace.__init__.__globals__ }}", "access to attribute '__init__'"),
        ("{{ dict.__globals__.os }}", "access to attribute '__globals__'"),
        ("{{ raise_exception.__globals__.sys }}", "access to attribute '__globals__'"),
        ("{{ '%s' % messages }}", "operator % on str is not allowed"),
        ("{{ '{0.__class__}'.format(1) }}", "access to attribute 'format'"),
        ("{{ ''['format'](1) }}", "access to attribute 'format'"),
        ("{{ 'a'.ljust(1000000000) }}", "access to attribute 'ljust'"),
        ("{{ 'a' | center(1000000000) }}", "No filter named 'center'"),
        ("{{ '' | attr('__class__') }}", "No filter named 'attr'"),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{{ messages[0].update(role='x') }}", "access to attribute 'update'"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{{ strftime_now('%1000000000d') }}", "pattern with a width"),
        ("{% set n = namespace(x=1) %}{{ n }}", "a namespace cannot be written"),
        ("{% set n = namespace(x=1) %}{{ [n] }}", "a namespace cannot be put into a container"),
        ("{% set n = namespace(x=1) %}{{ n | upper }}", "a namespace cannot be filtered"),
        ("{{ lipsum(100) }}", "'lipsum' is undefined"),
        ("{% for %}", "is not usable"),
        ("{{ 1 // 0 }}", "fails with ZeroDivisionError"),
    ],
)
def test_a_template_that_reaches_out_or_breaks_is_refused(source, message) -> None:
    with pytest.raises(PackageError, match=message):
        render(source)


def test_ordinary_long_conversations_stay_far_from_the_limits() -> None:
    words = "hello world " * 50
    conversation = [Message("assistant" if index % 2 else "user", words) for index in range(401)]
    started = time.monotonic()
    assert len(text(CHATML, conversation)) > 240_000
    assert time.monotonic() - started < 1


def write_config(folder, **keys) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(keys), encoding="utf-8")


def test_the_models_own_template_is_chosen_first_and_opens_with_its_tokens(tmp_path) -> None:
    write_config(
        tmp_path,
        chat_template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        bos_token="<s>",
        eos_token={"content": "</s>", "lstrip": False},
        pad_token=None,
    )
    choice = choose_template(tmp_path, "internlm2-chat-7b")
    assert choice.kind == "jinja"
    assert choice.name == "tokenizer_config.json"
    opened = open_template(choice, tmp_path, special_tokens=("<s>", "</s>"))
    assert opened.writes_bos
    assert opened.stop_words == ()
    assert opened.render([Message("user", "</s>")]) == (
        Segment("<s>", True),
        Segment("</s>", False),
        Segment("</s>", True),
    )


def test_tokens_that_the_config_leaves_out_come_from_their_map(tmp_path) -> None:
    write_config(tmp_path, chat_template="{{ bos_token }}{{ eos_token }}", eos_token="</s>")
    special = {"bos_token": {"content": "<s>"}, "eos_token": "<another>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    opened = open_template(choose_template(tmp_path, "any"), tmp_path, special_tokens=())
    assert "".join(segment.text for segment in opened.render([Message("user", "hi")])) == "<s></s>"


def test_a_template_in_its_own_file_goes_before_the_config(tmp_path) -> None:
    write_config(tmp_path, chat_template="config")
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    choice = choose_template(tmp_path, "any")
    assert (choice.name, choice.source) == ("chat_template.jinja", "file")


def test_of_several_templates_the_default_is_taken(tmp_path) -> None:
    entries = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    write_config(tmp_path, chat_template=entries)
    assert choose_template(tmp_path, "any").source == "D"
    write_config(tmp_path, chat_template=[{"name": ["no", "name"]}, *entries])
    assert choose_template(tmp_path, "any").source == "D"
    write_config(tmp_path, chat_template=entries[:1])
    assert choose_template(tmp_path, "qwen-7b") == TemplateChoice("builtin", "qwen-7b")


def test_without_an_own_template_the_family_decides_and_else_plain_text(tmp_path) -> None:
    assert choose_template(tmp_path, "InternLM2_5-7B-chat").name == "internlm2-chat"
    assert choose_template(tmp_path, "SmolLM2-135M") == TemplateChoice("builtin", "base")


def test_a_requested_builtin_overrides_the_models_own(tmp_path) -> None:
    write_config(tmp_path, chat_template="own")
    assert choose_template(tmp_path, "any", requested="llama-2").name == "llama2"
    with pytest.raises(UsageError, match="there is no chat template 'nonsense', expected one of"):
        choose_template(tmp_path, "any", requested="nonsense")


def test_a_hostile_template_does_not_get_into_a_package(tmp_path) -> None:
    write_config(tmp_path, chat_template="{{ 'a' * 10 ** 9 }}")
    with pytest.raises(PackageError, match="does too much"):
        choose_template(tmp_path, "any")


def test_a_template_that_takes_no_plain_question_is_the_packages_fault(tmp_path) -> None:
    write_config(tmp_path, chat_template="{{ raise_exception('pictures only') }}")
    with pytest.raises(
        PackageError, match=r"takes no plain question \(.*pictures only\), choose a"
    ):
        choose_template(tmp_path, "any")


def test_a_builtin_choice_opens_and_an_unknown_one_does_not(tmp_path) -> None:
    opened = open_template(TemplateChoice("builtin", "llama-2"), tmp_path, special_tokens=())
    assert isinstance(opened, BuiltinTemplate)
    with pytest.raises(
        PackageError, match="built-in chat template 'future-x', which this turbojet"
    ):
        open_template(TemplateChoice("builtin", "future-x"), tmp_path, special_tokens=())


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not JSON"), (b"[]", "is not a JSON object"), (b"\xff", "cannot be read")],
)
def test_a_broken_tokenizer_config_is_refused(tmp_path, content, message) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(PackageError, match=message):
        choose_template(tmp_path, "any")


def test_an_enormous_tokenizer_config_is_refused(tmp_path) -> None:
    with open(tmp_path / "tokenizer_config.json", "wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(PackageError, match="has 67108865 bytes, expected at most 67108864"):
        choose_template(tmp_path, "any")
