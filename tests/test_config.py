"""Configuration dataclasses, the command lines generated from them, and records in JSON."""

import dataclasses
import functools
import json
import operator
from typing import ClassVar, Literal, TypedDict

import click
import pytest
from click.testing import CliRunner

from dnnlib.cli import ConfigCommand, raw_value, replace_settings
from dnnlib.config import Config, from_dict, identity, option, to_dict
from dnnlib.text import parse_ranges
from dnnlib.typed import JsonFormat, parse_json, typed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Config):
    title: ClassVar[str] = "Inner options"
    num_heads: int = option(4, min=1, max=64, help="Heads.")
    cond: bool = option(False, help="Conditional.")
    blocks: tuple[int, ...] = option((2,), min=1, help="Blocks.")
    interval: tuple[float, float] | None = option(None, help="Interval.")
    rows: int | Literal["auto", "all"] | None = option(None, min=1, help="Rows.")
    mode: str = option("plain", choices=("plain", "fancy"), help="Mode.")
    strength: float = option(1.0, help="Strength.", requires={"mode": ("fancy",)}, aliases=("st",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Animal(Config):
    legs: int = option(4, help="Legs.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bird(Animal):
    family: ClassVar[str] = "bird"
    legs: int = option(2, help="Legs.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Config):
    inner: Inner = Inner()
    animal: Animal = Bird()


def invoke(*args):
    seen = []

    @click.command(
        cls=ConfigCommand,
        base=lambda raw: Outer(),
        elsewhere=lambda name, config: "--wings: preset b has." if name == "wings" else None,
        examples="  tool --num-heads=2\n",
    )
    @click.option("--outdir")
    def main(config, outdir):
        seen.append((config, outdir))

    result = CliRunner().invoke(main, list(args), terminal_width=100)
    return result, (seen[0][0] if seen else None)


@pytest.mark.parametrize(
    ("args", "field", "value"),
    [
        (["--num-heads=8"], "num_heads", 8),
        (["--num_heads", "8"], "num_heads", 8),
        (["--num-heads=1e1"], "num_heads", 10),
        (["--cond"], "cond", True),
        (["--cond=True"], "cond", True),
        (["--cond", "False"], "cond", False),
        (["--cond", "--no-cond"], "cond", False),
        (["--blocks=1,2,3"], "blocks", (1, 2, 3)),
        (["--interval=0.5,2"], "interval", (0.5, 2.0)),
        (["--interval=none"], "interval", None),
        (["--mode=fancy", "--st=2"], "strength", 2.0),
        (["--rows=7"], "rows", 7),
        (["--rows=Auto"], "rows", "auto"),
        (["--rows=7", "--rows=none"], "rows", None),
    ],
)
def test_an_option_reaches_its_field(args, field, value):
    result, config = invoke(*args)
    assert result.exit_code == 0, result.output
    assert getattr(config.inner, field) == value


def test_a_bare_flag_does_not_swallow_the_next_option():
    _, config = invoke("--cond", "--num-heads=3")
    assert config.inner.cond
    assert config.inner.num_heads == 3


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--num-heads=0"], ["--num-heads", "0", "an integer from 1 to 64"]),
        (["--num-heads=x"], ["--num-heads", "'x'", "an integer"]),
        (["--num-heads=1.5"], ["--num-heads", "'1.5'"]),
        (["--blocks=2,0"], ["--blocks", "2,0", "of at least 1"]),
        (["--rows=some"], ["--rows", "'some'", "an integer of at least 1, auto, all, or none"]),
        (["--rows=0"], ["--rows", "got 0", "an integer of at least 1, auto, all, or none"]),
        (["--mode=fanci"], ["--mode", "'fanci'", "plain, fancy", "Did you mean 'fancy'?"]),
        (["--cond=maybe"], ["--cond", "'maybe'", "True or False"]),
        (["--num-head=2"], ["--num-head", "--num-heads"]),
        (["--strength=2"], ["--strength has an effect only with --mode=fancy", "plain"]),
        (["--wings=2"], ["preset b has"]),
    ],
)
def test_a_wrong_option_gets_one_clear_sentence(args, parts):
    result, config = invoke(*args)
    assert result.exit_code == 2
    assert config is None
    for part in parts:
        assert part in result.output


def test_help_groups_options_and_shows_defaults_and_examples():
    result, _ = invoke("--help")
    assert result.output.index("Main options") < result.output.index("Inner options")
    assert "[default: 4]" in result.output
    assert "[default: none]" in result.output
    assert "tool --num-heads=2" in result.output


def test_a_config_survives_json():
    config = Outer(inner=Inner(interval=(0.1, 3.0), blocks=(1, 2)))
    text = json.dumps(to_dict(config))
    assert from_dict(Outer, json.loads(text)) == config


def test_a_family_is_restored_by_name_and_not_by_code():
    plain = to_dict(Outer())
    assert plain["animal"] == {"family": "bird", "legs": 2}
    assert isinstance(from_dict(Outer, plain).animal, Bird)
    plain["animal"]["family"] = "os.system"
    with pytest.raises(ValueError, match=r"Unknown family 'os\.system'"):
        from_dict(Outer, plain)


def test_an_unknown_setting_is_refused_and_a_missing_one_takes_its_default():
    with pytest.raises(ValueError, match="Unknown setting 'head'"):
        from_dict(Inner, {"head": 1})
    assert from_dict(Inner, {"num_heads": 8}) == Inner(num_heads=8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Config):
    affects: ClassVar[str] = "speed"
    interval: int = option(1, help="Interval.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work(Config):
    size: tuple[int, ...] = option((1, 2), help="Size.")
    workers: int = option(1, help="Workers.", affects="speed")
    inner: Inner = Inner()
    report: Report = Report()
    animal: Animal = Bird()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Config):
    name: str = "a"
    work: Work = Work()
    report: Report = Report()
    bird: Bird | None = None


def test_the_identity_of_a_run_is_what_decides_its_result():
    assert identity(Run(name="b")) == {
        "work.size": [1, 2],
        "work.inner": to_dict(Inner()),
        "work.report": {},
        "work.animal": {"family": "bird", "legs": 2},
    }
    assert identity(Run(bird=Bird()))["bird.legs"] == 2


@pytest.mark.parametrize(
    ("path", "value", "same"),
    [
        (("work", "size"), (1, 3), False),
        (("work", "workers"), 2, True),
        (("work", "inner", "cond"), True, False),
        (("work", "report", "interval"), 2, True),
        (("work", "animal", "legs"), 3, False),
        (("report", "interval"), 2, True),
    ],
)
def test_settings_that_affect_the_speed_alone_make_no_other_run(path, value, same):
    other = replace_settings(Run(), {path: value})
    assert (identity(other) == identity(Run())) == same


def test_a_config_checks_types_when_it_is_made():
    with pytest.raises(ValueError, match="--num-heads"):
        Inner(num_heads=2.5)
    with pytest.raises(ValueError, match="--strength"):
        Inner(strength="a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Inner().num_heads = 3


def test_replacing_settings_leaves_the_original_alone():
    config = Outer()
    changed = replace_settings(config, {("inner", "num_heads"): 9})
    assert (config.inner.num_heads, changed.inner.num_heads) == (4, 9)


def test_raw_values_are_found_in_both_spellings():
    assert raw_value(["--preset", "a", "--x"], "preset") == "a"
    assert raw_value(["--preset=a", "--preset=b"], "preset") == "b"
    assert raw_value(["--x=1"], "preset") is None


@dataclasses.dataclass(frozen=True)
class Part:
    size: tuple[int, int]
    weight: float
    flag: bool


class Facts(TypedDict):
    train: int


@dataclasses.dataclass(frozen=True)
class Record:
    name: str
    parts: list[Part]
    facts: Facts
    note: str | None
    names: list[str]


RECORD = dict(
    name="a",
    parts=[
        dict(size=[1, 2], weight=3, flag=False),
        dict(size=[3, 4], weight=0.5, flag=True, more=1),
    ],
    facts=dict(train=1, more=[]),
    note=None,
    names=["x"],
)


def test_a_record_is_restored_at_any_depth():
    parts = [Part((1, 2), 3, False), Part((3, 4), 0.5, True)]
    expected = Record("a", parts, {"train": 1, "more": []}, None, ["x"])
    assert typed(Record, json.loads(json.dumps(RECORD))) == expected


@pytest.mark.parametrize(
    ("keys", "value", "problem"),
    [
        (("name",), 1, "name is 1"),
        (("name",), ..., "name is missing"),
        (("note",), ..., "note is missing"),
        (("parts",), {}, "parts is {}"),
        (("parts", 1), 3, r"parts\[1\] is 3"),
        (("parts", 1, "size"), [1], r"parts\[1\].size is \[1\]"),
        (("parts", 0, "size", 1), True, r"parts\[0\].size\[1\] is True"),
        (("parts", 0, "weight"), float("inf"), r"parts\[0\].weight is inf"),
        (("parts", 0, "flag"), 0, r"parts\[0\].flag is 0"),
        (("facts", "train"), 1.5, r"facts.train is 1.5"),
        (("names", 0), None, r"names\[0\] is None"),
    ],
)
def test_a_wrong_value_of_a_record_is_named(keys, value, problem):
    values = json.loads(json.dumps(RECORD))
    *outer, last = keys
    place = functools.reduce(operator.getitem, outer, values)
    if value is ...:
        del place[last]
    else:
        place[last] = value
    with pytest.raises(ValueError, match=f"^{problem}$"):
        typed(Record, values)


def test_a_file_of_records_says_what_it_is():
    tests = JsonFormat("tests", 2, "pytest", "run it again")
    whole = b'{"format": "tests", "version": 1, "a": "b"}'
    assert tests.parse(whole, "a.json", lambda values: values["a"]) == "b"
    for content, problem in (
        (b"{", "a.json: damaged, not valid JSON .*; run it again"),
        (b"[]", "a.json: not written by pytest"),
        (b'{"format": "tests"}', "has format version None, but .* reads up to 2"),
        (b'{"format": "tests", "version": 3}', "has format version 3, but .* reads up to 2"),
        (whole, r"a.json: damaged \(invalid literal for int.*\); run it again"),
    ):
        with pytest.raises(ValueError, match=problem):
            tests.parse(content, "a.json", lambda values: int(values["a"]))


def test_lists_of_integers_accept_ranges_and_refuse_anything_else():
    assert parse_ranges("--seeds", "0-3,7, 10-11") == [0, 1, 2, 3, 7, 10, 11]
    for text in ("", "a", "3-", "-3", "1-2-3", "\u00b2"):
        with pytest.raises(ValueError, match=r"--seeds: got .*; accepted: integers and ranges"):
            parse_ranges("--seeds", text)
    with pytest.raises(ValueError, match="--seeds: got 7-5, which ends before it starts"):
        parse_ranges("--seeds", "1,7-5")


def test_a_list_has_a_bound_on_its_length_and_a_number_one_on_its_digits():
    for text in ("0-9999999999", "5," * 3 + "0-9999999"):
        with pytest.raises(ValueError, match=r"--seeds: got .*at most 10,000,000 numbers"):
            parse_ranges("--seeds", text)
    with pytest.raises(ValueError, match="accepted: integers and ranges"):
        parse_ranges("--seeds", "9" * 5000)


def test_a_name_of_several_classes_names_none():
    with pytest.raises(ValueError, match="--class: got 'b', but classes 1 and 2 have that name"):
        parse_ranges("--class", "b", ["a", "b", "b"])
    assert parse_ranges("--class", "0,2", ["a", "b", "b"]) == [0, 2]


def test_where_classes_are_called_by_numbers_all_numbers_are_names():
    names = ["1", "2", "10", "cat"]
    assert parse_ranges("--class", "1,2", names) == parse_ranges("--class", "1-2", names) == [0, 1]
    assert parse_ranges("--class", "2-10,cat", names) == [1, 2, 3]
    for text in ("0", "1-3"):
        with pytest.raises(ValueError, match=r"no class is called [03]; .* 1, 2 and 10"):
            parse_ranges("--class", text, names)


def test_json_that_is_nested_too_deeply_is_an_error_and_not_the_end_of_the_stack():
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 200_000)


def test_lists_of_classes_accept_names_and_their_indices():
    names = ("cat", "dog", "0-1", "cow")
    assert parse_ranges("--class", ["dog", "2-3", "0-1", "0"], names) == [1, 2, 3, 2, 0]
    with pytest.raises(ValueError, match=r"--class: no class 'do'\. Did you mean 'dog'"):
        parse_ranges("--class", "do", names)
    for text in ("4", "0-4"):
        with pytest.raises(
            ValueError, match=rf"got {text}; accepted: names, and indices .* 0 to 3"
        ):
            parse_ranges("--class", text, names)
