"""Configuration files: what YAML takes without a word is refused with file and line."""

from __future__ import annotations

import math

import pytest

from opd_lightning.config_file import ConfigError, load, overlaid, read, said

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: &a\n  init_args: *a\n", r"c\.yaml, line 1: model\.init_args is an alias of what holds it"),
        ("a:\n  - &x\n    - *x\n", r"a\[0\]\[0\] is an alias of what holds it"),
        (BOMB, r"its aliases unfold into more than 100,000 values"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", r"c\.yaml, line 4: a\.b is there twice, first in line 2"),
        ("a: 1\na: 1\n", r"line 2: a is there twice"),
        ("a: {b: .nan}\n", r"line 1: a\.b is \.nan, which is no number"),
        ("a:\n- 1.0\n- -.inf\n", r"line 3: a\[1\] is -\.inf"),
        ("a: 1.0e+999\n", r"a is 1\.0e\+999, which is no number"),
        ("a: {b: 1\n", r"c\.yaml, line 2: this is no YAML"),
        ("a:\n\tb: 1\n", r"line 2: this is no YAML: found character"),
        ("a: !!python/object:os.system x\n", r"line 1: this is no YAML: could not determine a constructor"),
        ("prompt: {{ prompt }}\n", r"line 1: prompt has a key that is no text; a value that begins with \{\{ must"),
        ("view:\n  prompt: {{ prompt }} why?\n", r"line 2: this is no YAML.*that begins with \{\{ must be quoted"),
        ("- a\n", r"c\.yaml: a configuration is keys and values, and this holds a list"),
        ("", r"this holds nothing"),
        ("hello\n", r"this holds one value: 'hello'"),
        ("[" * 5000, r"c\.yaml"),
    ],
)
def test_what_can_not_be_meant_is_refused(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read(str(path))


def test_other_encodings_and_files_that_are_none(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes("a: 1\nb: größer\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"c\.yaml, line 2: this is not UTF-8"):
        read(str(path))
    with pytest.raises(ConfigError, match=r"nope\.yaml: No such file"):
        read(str(tmp_path / "nope.yaml"))
    with pytest.raises(ConfigError, match=r"Is a directory"):
        read(str(tmp_path))


def test_what_is_fine_stays_as_it_is(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + "a: &x {b: größer, c: 1e-3}\nd: *x\ne: {<<: *x, b: nan}\nf: 1:30.5\n".encode())
    source = read(str(path))
    assert source.values["d"] == source.values["a"] == {"b": "größer", "c": 0.001}
    assert source.values["e"] == {"b": "nan", "c": 0.001}, "a word, which the type of its key judges"
    assert source.place(("e", "b")) == f"{path}, line 3"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("# {{ prompt }}", "# {{ prompt }}"),
        ("#", "#"),
        ("&a", "&a"),
        ("null", None),
        ("~", None),
        ("[1, 2]", [1, 2]),
        ('{"a": "# b"}', {"a": "# b"}),
        ("{a: 1e-3}", {"a": 0.001}),
        ("{{ prompt }}", "{{ prompt }}"),
    ],
)
def test_values_of_the_command_line(text, value):
    assert load(text) == value


def test_overlays_replace_key_by_key_and_another_class_begins_anew():
    before = {"weights": {"class_path": "EMA", "init_args": {"rate": 0.1, "every": 2}}, "view": 1}
    same = overlaid(before, {"weights": {"class_path": "x.EMA", "init_args": {"rate": 0.5}}})
    assert same["weights"]["init_args"] == {"rate": 0.5, "every": 2}
    assert overlaid(before, {"weights": {"class_path": "Live"}}) == {"weights": {"class_path": "Live"}, "view": 1}


def test_a_class_that_was_given_by_its_name_alone_has_the_arguments_beside_it():
    assert overlaid("x.SGD", {"init_args": {"lr": 0.1}}) == {"class_path": "x.SGD", "init_args": {"lr": 0.1}}
    assert overlaid({"init_args": {"lr": 0.1}}, "x.SGD") == {"class_path": "x.SGD", "init_args": {"lr": 0.1}}
    assert overlaid("a text", {"role": "user"}) == {"role": "user"}


def test_arguments_that_are_none():
    with pytest.raises(ConfigError, match=r"quickstart\.yaml: what is this\? Files are given as `-c FILE`"):
        said(["quickstart.yaml"])
    assert [source.values for source in said(["--a.b", "3", "--c=x", "--print_config"])] == [
        {"a": {"b": "3"}},
        {"c": "x"},
        {},
    ]
    assert math.isnan(load(".nan"))
