"""Tokenizer, chat templates and streaming, with small tokenizers made here and transformers as the judge."""

from __future__ import annotations

import json
import threading
import tracemalloc

import jinja2
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgert import chat_template
from edgert.errors import BundleError, ChatTemplateError, UsageError
from edgert.text import StreamDecoder, Tokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    *("the cat sat on the mat, and the dog sat by the cat.", "héllo wörld"),
    *("日本語のテキスト", "👩‍🚀 emoji 😀😃"),
] * 3


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2-like: every byte is a token, merges on top."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, **options))
    return backend


def metaspace(*, legacy: bool = True) -> tokenizers.Tokenizer:
    """Llama-like: words begin with ▁, what is unknown falls back to byte tokens, bos is put first."""
    pieces = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))]
    letters = sorted({c for text in TEXTS[:2] for c in text} - {" "})
    vocab = {piece: i for i, piece in enumerate([*pieces, "▁", *letters, "▁t", "▁th", "▁the", "at", "▁▁"])}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("a", "t"), ("▁", "▁")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token=None))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def save(folder, backend, config=None, jinja=None):
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **(config or {})}), "utf-8")
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja, "utf-8")
    return Tokenizer.open(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    kinds = {"bytes": byte_level(), "llama": metaspace(), "metaspace": metaspace(legacy=False)}
    return {name: save(tmp_path_factory.mktemp(name), backend) for name, backend in kinds.items()}


def stream(tokenizer, ids, stop=(), prompt=()):
    decoder = StreamDecoder(tokenizer, stop, prompt=prompt)
    pieces = [decoder.push(i) for i in ids]
    return [*pieces, decoder.flush()], decoder


# Tokenizer


def test_encode_and_decode(made):
    for tokenizer in made.values():
        assert tokenizer.bos_id == 0
        assert tokenizer.eos_id == 1
        assert tokenizer.pad_id is None
        assert tokenizer.special_ids == {0, 1, 2, 3}
        for text in ("the cat", ""):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert made["bytes"].decode(made["bytes"].encode("a<|im_end|>b")) == "ab"
    assert made["llama"].encode("the cat")[0] == 0
    assert made["llama"].encode("the cat", special=False)[0] != 0
    assert made["bytes"].encode("the cat")[0] != 0
    assert made["bytes"].vocab_size == 330
    assert made["bytes"].decode([-1, 10**6, 2**40]) == ""
    assert made["bytes"].token(2) == "<|im_start|>"
    assert made["bytes"].token(5000) is None
    assert made["bytes"].token(-1) is None


def test_add_bos_token_overrules_the_file(tmp_path):
    plain, llama = tmp_path / "plain", tmp_path / "llama"
    plain.mkdir(), llama.mkdir()
    assert save(plain, byte_level(), {"add_bos_token": True}).encode("cat")[0] == 0
    llama_ids = save(llama, metaspace(), {"add_bos_token": False}).encode("cat")
    assert 0 not in llama_ids
    assert save(llama, metaspace(), {"add_bos_token": True}).encode("cat") == [0, *llama_ids]


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    ids = save(tmp_path, backend).encode("the dog sat by the cat")
    assert 2 < len(ids) < 64


@pytest.mark.parametrize("value", [None, 5, b"x", "half \ud83d"])
def test_text_that_is_none(made, value):
    with pytest.raises(UsageError, match="text is"):
        made["bytes"].encode(value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"{" * 100_000),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "BPE"'),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default", "template": 1}]}'),
        ("chat_template.jinja", b"\xff"),
        ("chat_template.jinja", b"a" * 2**21),
    ],
    ids=lambda value: str(value)[:40],
)
def test_damaged_files(tmp_path, name, content):
    save(tmp_path, byte_level())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BundleError, match=name):
        Tokenizer.open(tmp_path)


def test_linked_files_are_refused(tmp_path):
    save(tmp_path, byte_level())
    secret = tmp_path / "secret"
    secret.write_text("{{ messages }}", "utf-8")
    try:
        (tmp_path / "chat_template.jinja").symlink_to(secret)
    except OSError:
        pytest.skip("this system allows no symbolic links")
    with pytest.raises(BundleError, match=r"chat_template\.jinja is a symbolic link"):
        Tokenizer.open(tmp_path)


# Chat templates

CHATML = """{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """{{- bos_token }}{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<|start|>' + message['role'] + '<|end|>\\n\\n'+ message['content'] | trim + '</s>' %}
{% if loop.index0 == 0 %}{% set content = '[first]' ~ content ~ loop.length %}{% endif %}{{ content }}{% endfor %}
{%- if tools is not none %}{{ tools | tojson(indent=4) }}{{ (tools | first).function.name | upper }}{% endif %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate') }}{% endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<turn>' + role + '\\n' + (message['content'] | trim) + '</turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}"""
MISTRAL = """{%- if messages[0].role == 'system' %}{% set system, rest = messages[0].content, messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}
{%- set ns = namespace(index=0, seen=[]) %}{{- bos_token }}
{%- for message in rest %}{% if message.role == 'tool' %}{% continue %}{% endif %}
{%- set ns.index = ns.index + 1 %}{% set ns.seen = ns.seen + [message.role] %}
{%- if message.role == 'user' %}{{ '[INST] ' + (system ~ '\\n\\n' if system is defined and loop.last else '')
    + message.content + ' [/INST]' }}
{%- else %}{% generation %}{{ ' %s' % message.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}
{{- ns.index }}{{ ns.seen | join(',') }}{{ ','.join(ns.seen[::-1]) }}{{ missing }}{{ pad_token }}"""
MACROS = """{%- macro part(item, depth=0) -%}{% if item is string %}{{ item.replace('a', 'A').strip() }}
{%- elif item is mapping %}{% for key, value in item.items() %}{{ '  ' * depth }}{{ key }}: {{ part(value, depth + 1) }}
{% endfor %}{% else %}{% for one in item if one %}{{ part(one, depth) }}{% endfor %}{% endif %}{%- endmacro -%}
{% for message in messages recursive %}{{ loop.index }}/{{ loop.previtem.role if loop.previtem }}{{ part(message) }}
{% endfor %}{% set text %}{{ messages | map(attribute='role') | unique | list | tojson }}{% endset %}{{ text }}
{{ "{} {:>5}|{a}" .format('x', messages|length, a=[1, None, {'k': (1,)}]) }}{{ "%05.1f" | format(2.5) }}
{{ 7 // 2 * 2 ** 3 }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages[-1].content.split(' ')[0][1:] }}
{{ 'a\\nb' | indent(3) }}{{ {'z': '<é>'} | tojson }}{{ [3, 1] | sort }}{{ 'x' | replace('x', 'yy') }}{{ none }}
{% for a in [1, 2, 3] %}{% if a == 2 %}{% break %}{% endif %}{{ a }}{% else %}none{% endfor %}{{ tools is none }}
{% if '</think>' in messages[-1].content %}{{ messages[-1].content.split('</think>')[-1].lstrip('\\n') }}{% endif %}"""

CHATS = [
    [{"role": "user", "content": "  Hi there 日本 "}],
    [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat </think>\non"},
        {"role": "user", "content": "mat"},
    ],
    [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": "a & b"}],
]
TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize(
    "template",
    [CHATML, LLAMA3, GEMMA, MISTRAL, MACROS],
    ids=["chatml", "llama3", "gemma", "mistral", "macros"],
)
@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
def test_renders_as_transformers_does(tmp_path, template, chat, tools):
    transformers = pytest.importorskip("transformers")
    ours = save(tmp_path, metaspace(), jinja=template)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>", chat_template=template
    )
    for prompt in (True, False):
        options = {"tools": tools, "add_generation_prompt": prompt}
        if template is GEMMA and chat[0]["role"] == "system":
            with pytest.raises(jinja2.TemplateError) as theirs_raised:
                theirs.apply_chat_template(chat, tokenize=False, **options)
            with pytest.raises(ChatTemplateError, match="System role not supported") as raised:
                ours.render_chat(chat, **options)
            assert str(theirs_raised.value) in str(raised.value)
            continue
        expected = theirs.apply_chat_template(chat, tokenize=False, **options)
        assert ours.render_chat(chat, **options) == expected
        ids = ours.encode_chat(chat, **options)
        assert ids == theirs.apply_chat_template(chat, tokenize=True, return_dict=False, **options)
        assert ids.count(ours.bos_id) <= 1


def test_where_the_template_comes_from(tmp_path):
    chat = CHATS[0]
    assert not save(tmp_path, byte_level()).has_chat_template
    with pytest.raises(ChatTemplateError, match="no chat template"):
        Tokenizer.open(tmp_path).encode_chat(chat)
    assert save(tmp_path, byte_level(), {"chat_template": "one"}).render_chat(chat) == "one"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    tokenizer = save(tmp_path, byte_level(), {"chat_template": named})
    assert tokenizer.render_chat(chat) == "plain"
    assert tokenizer.render_chat(chat, tools=TOOLS) == "with tools"
    with pytest.raises(ChatTemplateError, match="default, only tool_use"):
        save(tmp_path, byte_level(), {"chat_template": named[1:]}).render_chat(chat)
    assert save(tmp_path, byte_level(), {"chat_template": "one"}, jinja="file").render_chat(chat) == "file"


def test_strftime_now(tmp_path):
    text = save(tmp_path, byte_level(), jinja="{{ strftime_now('%Y-%m-%d') }}").render_chat(CHATS[0])
    assert len(text) == 10
    assert text[:2] == "20"


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        {"role": "user", "content": "x"},
        ["hi"],
        [{"content": "x"}],
        [{"role": 1, "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
    ],
    ids=str,
)
def test_messages_of_another_form(tmp_path, messages):
    tokenizer = save(tmp_path, byte_level(), jinja=CHATML)
    with pytest.raises(UsageError, match="messages"):
        tokenizer.encode_chat(messages)


def test_tools_of_another_form(tmp_path):
    tokenizer = save(tmp_path, byte_level(), jinja="ok")
    with pytest.raises(UsageError, match="tools is a str"):
        tokenizer.encode_chat(CHATS[0], tools="get")
    call = [{"role": "assistant", "tool_calls": [{"function": {"name": "get"}}]}]
    assert tokenizer.render_chat(call) == "ok"


ATTACKS = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ (''|attr('__class__')).mro }}",
    "map attribute": "{{ (['']|map(attribute='__class__')|first).mro }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "indirect format": "{% set f = '{0.__class__.x}'.format %}{{ f('') }}",
    "format_map": "{{ '{a.__class__.x}'.format_map({'a': ''}) }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "globals of function": "{{ raise_exception.__globals__.os }}",
    "globals of self": "{{ self.__init__.__globals__ }}",
    "globals of macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "environment": "{{ self._TemplateReference__context.environment }}",
    "namespace": "{{ namespace.__init__.__builtins__ }}",
    "lipsum": "{{ lipsum.__globals__ }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends 'base.html' %}",
    "mutation": "{{ messages.append(1) }}",
    "mutation of a message": "{{ messages[0].update({'role': 'system'}) }}",
    "range": "{% for i in range(10**12) %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "recursive macro": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive loop": "{% set l = [1, 2] %}{% for x in l recursive %}{{ loop(l) }}{% endfor %}",
    "repeat": "{{ 'a' * 10**10 }}",
    "repeat reversed": "{{ 10**10 * 'a' }}",
    "repeat a list": "{{ [0] * 10**10 }}",
    "repeat twice": "{% set a = 'a' * 10**5 %}{% set b = [a] * 10**5 %}{{ b|join }}",
    "power": "{{ 10**(10**10) }}",
    "product": "{% set ns = namespace(x=7) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "concat": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "plus": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "set block": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = y %}{% endfor %}",
    "text of the template": "{% for i in range(99999) %}" + "a" * 9999 + "{% endfor %}",
    "nested lists": "{% set ns = namespace(x=['a']) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ ns.x }}",
    "nested tuples": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
    "{{ ns.x|tojson }}",
    "nested dicts": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = {1: ns.x, 2: ns.x} %}"
    "{% endfor %}{{ ns.x|string }}",
    "slices": "{% set a = 'a' * 10**5 %}{% set ns = namespace(x=[]) %}{% for i in range(9999) %}"
    "{% set ns.x = ns.x + [a[i:]] %}{% endfor %}",
    "replace": "{% set a = 'a' * 10**5 %}{{ a|replace('a', a) }}",
    "replace by name": "{% set a = 'a' * 10**5 %}{{ a|replace(new=a, old='a') }}",
    "replace method": "{% set a = 'a' * 10**5 %}{{ a.replace('a', a) }}",
    "join": "{% set a = 'a' * 10**5 %}{{ a|join(a) }}",
    "join by name": "{% set a = 'a' * 10**5 %}{{ a|join(d=a) }}",
    "join method": "{% set a = 'a' * 10**5 %}{{ a.join(a) }}",
    "join lazily": "{% set a = 'a' * 10**5 %}{{ ([{'x': a}] * 99999)|map(attribute='x')|join }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "to_bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "center": "{{ 'a'|center(10**10) }}",
    "indent": "{{ 'a\n\nb'|indent(10**10) }}",
    "tojson indent": "{{ [1]|tojson(indent=10**10) }}",
    "round": "{{ 1.5|round(10**9, 'ceil') }}",
    "percent width": "{{ '%10000000000d' % 1 }}",
    "percent star": "{{ '%*d'|format(10**10, 1) }}",
    "format width": "{{ '{:10000000000}'.format(1) }}",
    "format nested width": "{{ '{:{}}'.format(1, 10**10) }}",
    "format repeats": "{% set a = 'a' * 10**5 %}{{ ('{0}' * 10**4).format(a) }}",
    "percent repeats": "{% set a = 'a' * 10**5 %}{{ ('%(k)s' * 10**4) % {'k': a} }}",
    "strftime width": "{{ strftime_now('%1000000000d') }}",
    "syntax": "{% for %}",
    "depth": "{{ " + "(" * 50_000 + " }}",
    "chain": "{{ a" + ".b" * 50_000 + " }}",
    "size": "a" * (256 * 1024 + 1),
    "unknown filter": "{{ 'a'|xmlattr }}",
}


@pytest.mark.parametrize("source", ATTACKS.values(), ids=ATTACKS)
def test_attacks(tmp_path, monkeypatch, source):
    monkeypatch.setattr(chat_template, "MAX_WORK", 2**19)  # only to be quick
    tokenizer = save(tmp_path, byte_level(), jinja=source)
    tokenizer.encode("text without the template works")
    messages = [{"role": "user", "content": "hi"}]
    tracemalloc.start()
    try:
        with pytest.raises(ChatTemplateError) as caught:
            tokenizer.encode_chat(messages)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert messages == [{"role": "user", "content": "hi"}]
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert peak_bytes < 32 * 2**20


def test_time_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", -1.0)
    with pytest.raises(ChatTemplateError, match="longer than"):
        save(tmp_path, byte_level(), jinja="{{ 1 }}").encode_chat(CHATS[0])


def test_long_chats_are_within_bounds(tmp_path):
    chat = [{"role": ["user", "assistant"][i % 2], "content": "word " * 2000} for i in range(101)]
    text = save(tmp_path, byte_level(), jinja=LLAMA3).render_chat(chat)
    assert len(text) > 101 * 9999


def test_content_that_looks_like_a_format_is_only_text(tmp_path):
    content = '{"year": 20240101, "pad": "{:99999}"} %99999d %(x)s'
    source = "{{ '%s' % messages[0].content }}{{ '{}'.format(messages[0].content) }}{{ messages[0].content }}"
    tokenizer = save(tmp_path, byte_level(), jinja=source)
    assert tokenizer.render_chat([{"role": "user", "content": content}]) == content * 3


def test_rendering_from_several_threads(tmp_path):
    tokenizer = save(tmp_path, byte_level(), jinja=CHATML)
    expected = tokenizer.encode_chat(CHATS[1])
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.append(tokenizer.encode_chat(CHATS[1]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8


# Streaming


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(["bytes", "llama", "metaspace"]), data=st.data())
def test_pieces_are_the_decoded_text(made, kind, data):
    tokenizer = made[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=80))
    pieces, decoder = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not decoder.finished
    assert decoder.flush() == ""


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["bytes", "llama"]),
    text=st.text(alphabet="the cat😀日é\n", max_size=40),
    cut=st.integers(0, 40),
)
def test_pieces_continue_a_prompt(made, kind, text, cut):
    tokenizer = made[kind]
    ids = tokenizer.encode(text)
    prompt, answer = ids[:cut], ids[cut:]
    decoder = StreamDecoder(tokenizer, prompt=prompt)
    pieces = [decoder.push(i) for i in answer]
    assert not any("\ufffd" in piece for piece in pieces)
    whole = tokenizer.decode(ids)
    begun = tokenizer.decode(prompt).rstrip("\ufffd")
    assert begun + "".join(pieces) + decoder.flush() == whole


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(["bytes", "llama"]),
    text=st.text(alphabet="abt 😀", max_size=30),
    stop=st.lists(st.text(alphabet="abt 😀", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_end_the_text(made, kind, text, stop):
    tokenizer = made[kind]
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    # The first completed: the shortest beginning of the text that ends with one.
    seen = [(end, s) for end in range(len(whole) + 1) for s in stop if whole[:end].endswith(s)]
    pieces, decoder = stream(tokenizer, ids, stop)
    if not seen:
        assert "".join(pieces) == whole
        assert not decoder.finished
        return
    end = seen[0][0]
    longest = max(len(s) for e, s in seen if e == end)
    assert "".join(pieces) == whole[: end - longest]
    assert decoder.finished
    assert decoder.push(ids[-1]) == ""
    assert decoder.flush() == ""


def test_characters_come_whole(made):
    text = "🙂 한국 ñ"
    for tokenizer in made.values():
        if tokenizer is made["metaspace"]:
            continue  # has no decoder for bytes
        ids = tokenizer.encode(text, special=False)
        assert len(ids) > len(text)
        pieces, _ = stream(tokenizer, ids)
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)
        assert sum(bool(piece) for piece in pieces) > 1


def test_text_comes_at_once(made):
    tokenizer = made["llama"]
    ids = tokenizer.encode("the cat sat")
    decoder = StreamDecoder(tokenizer)
    given_away = ""
    for index, token_id in enumerate(ids):
        given_away += decoder.push(token_id)
        assert given_away == tokenizer.decode(ids[: index + 1])


def test_unfinished_character_at_the_end(made):
    tokenizer = made["bytes"]
    ids = [tokenizer._backend.token_to_id(c) for c in "ðŁĺ"]  # three of the four bytes of an emoji
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(i) for i in ids] == ["", "", ""]
    assert decoder.flush() == "\ufffd"


def test_stop_over_tokens_at_the_start_and_overlapping(made):
    tokenizer = made["llama"]

    def text(content, stop):
        pieces, decoder = stream(tokenizer, tokenizer.encode(content), stop)
        return "".join(pieces), decoder.finished

    assert text("the cat sat", ["the"]) == ("", True)
    assert text("the cat sat", ["cat sat"]) == ("the ", True)
    assert text("the cat sat", ["at s", "cat sat"]) == ("the c", True)
    assert text("the cat sat", ["at sat", "cat sat"]) == ("the ", True)
    assert text("aaab", ["aab"]) == ("a", True)
    assert text("the cat", ["cats"]) == ("the cat", False)


def test_held_text_comes_when_the_stop_does_not(made):
    tokenizer = made["bytes"]
    decoder = StreamDecoder(tokenizer, ["XYZ"])
    ids = [tokenizer.encode(c)[0] for c in "aXYbX"]
    assert [decoder.push(i) for i in ids] == ["a", "", "", "XYb", ""]
    assert decoder.flush() == "X"


@pytest.mark.parametrize("stop", ["x", [""], [1]], ids=str)
def test_stop_of_another_form(made, stop):
    with pytest.raises(UsageError, match="stop is"):
        StreamDecoder(made["bytes"], stop)


def test_a_step_costs_the_same_however_long_the_text(made):
    tokenizer = made["bytes"]
    invalid = tokenizer._backend.token_to_id("ÿ")  # byte 0xff, never part of a character
    word = tokenizer.encode(" the cat 日")
    for ids in ([invalid] * 500, word * 60):
        decoder = StreamDecoder(tokenizer)
        text = ""
        for token_id in ids:
            text += decoder.push(token_id)
            assert len(decoder._window) <= 33
        assert text + decoder.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("special", [True, False])
def test_long_texts_are_encoded_as_short_ones(made, monkeypatch, special):
    """They go another way, so that other threads can run meanwhile."""
    text = "".join(TEXTS) * 10
    expected = {name: tokenizer.encode(text, special=special) for name, tokenizer in made.items()}
    monkeypatch.setattr("edgert.text.LONG_CHARS", 100)
    monkeypatch.setattr("edgert.text.LONGEST_CHARS", 1)
    for name, tokenizer in made.items():
        fresh = Tokenizer(tokenizer._backend, {}, {})
        assert tokenizer.encode(text, special=special) == expected[name]
        assert 0 < fresh.least_tokens(text) <= len(expected[name])
        assert fresh.least_tokens("short") == 0
        with pytest.raises(UsageError, match="half a surrogate"):
            tokenizer.encode("x" * 100 + "\ud800")


def test_other_threads_run_while_a_long_text_is_encoded(made):
    """A worker answers its server meanwhile, or counts as hung."""
    text, beats, done = "the cat and the dog " * 20_000, 0, threading.Event()

    def encode() -> None:
        made["bytes"].encode(text)
        done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    while not done.is_set():
        beats += 1
        done.wait(0.001)
    thread.join()
    assert beats > 5
