"""`millrace fleet simulate` without a farm: what it says, draws and writes, and what it refuses."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from millrace.commands.scaling import WarmTime
from millrace.commands.simulate import fleet_simulate
from millrace.errors import MillraceError
from scheduler.fleets.loads import read_csv, synthetic

BURST = ("--synthetic", "burst:40,length=20,spread=0")


def ran(*words: str) -> Result:
    return CliRunner().invoke(fleet_simulate, list(words), standalone_mode=False)


def said(*words: str) -> str:
    result = ran(*words)
    assert result.exception is None, result.exception
    return result.output


def found(*words: str) -> list[dict[str, Any]]:
    variants: list[dict[str, Any]] = json.loads(said(*words, "--json"))["variants"]
    return variants


def test_a_table_says_how_it_went() -> None:
    text = said(*BURST, "--maximum", "4", "--cost", "0.5")
    assert "burst:40,length=20,spread=0: 40 builds over 0 s, of 20 s in the middle and 20 s at most" in text
    assert "0 to 4 workers of 2 slots, there 30 s after they are asked for" in text
    row = next(line for line in text.splitlines() if line.startswith("as set"))
    assert re.split(r"  +", row.strip())[1:5] == ["1.2 min", "1.8 min", "1.8 min", "1.8 min"]
    assert len([line for line in text.splitlines() if line.startswith("00:")]) == 12


def test_each_combination_of_what_if_is_a_row() -> None:
    variants = found(*BURST, "--maximum", "8", "--what-if", "maximum=2,4", "--what-if", "--slots=1,4")
    names = [variant["name"] for variant in variants]
    assert names == ["as set", *(f"maximum {m}, slots {s}" for m in (2, 4) for s in (1, 4))]
    assert [variant["scaling"]["maximum"] for variant in variants] == [8, 2, 2, 4, 4]
    assert [variant["slots"] for variant in variants] == [2, 1, 4, 1, 4]
    longest = [variant["waitS"]["max"] for variant in variants]
    assert longest[1] > longest[2] > longest[4]


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("minimum", "0,2"),
        ("maximum", "2,4"),
        ("target-wait", "0,60"),
        ("headroom", "0,4"),
        ("utilization", "50,100"),
        ("shrink-after", "60,600"),
        ("slots", "1,2"),
        ("boot-time", "1,60"),
        ("leave-time", "0,60"),
        ("cost", "1,2"),
        ("every", "1,60"),
    ],
)
def test_every_parameter_can_be_tried_and_makes_a_difference(option: str, values: str) -> None:
    load = ("--synthetic", "burst:20,times=2,every=600,length=20", "--cost", "1", "--maximum", "8")
    first, second = (
        {name: value for name, value in one.items() if name != "name"}
        for one in found(*load, "--what-if", f"{option}={values}")[1:]
    )
    outcomes = ("waitS", "workerS", "cost")
    assert [first[name] for name in outcomes] != [second[name] for name in outcomes]


def test_pictures_are_svg_with_a_panel_for_waiting_size_and_cost(tmp_path: Path) -> None:
    one, several = tmp_path / "one.svg", tmp_path / "several.svg"
    said(*BURST, "--maximum", "4", "--cost", "1", "--svg", str(one))
    said(*BURST, "--maximum", "4", "--what-if", "maximum=1,2", "--svg", str(several))
    for path, words in (
        (one, {"longest wait of the builds that started then, s", "waiting", "workers", "wanted", "cost so far"}),
        (several, {"as set", "maximum 1", "maximum 2", "workers", "worker hours so far"}),
    ):
        picture = ET.fromstring(path.read_text())  # noqa: S314  # our own
        assert words <= {text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")}
        assert "nan" not in path.read_text()


def test_a_load_can_be_kept_and_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "load.csv"
    text = "poisson:60,hours=1"
    first = found("--synthetic", text, "--maximum", "4", "--save-load", str(path))
    again = found("--load", str(path), "--maximum", "4")
    assert again[0]["waitS"] == pytest.approx(first[0]["waitS"], abs=0.1)
    with path.open() as lines:
        kept = read_csv("load.csv", lines)
    assert kept.start_ms == synthetic(text, 1).start_ms
    assert len(kept.arrivals) == len(synthetic(text, 1).arrivals)


def test_what_was_waited_stands_beside_what_would_be(tmp_path: Path) -> None:
    path = tmp_path / "load.csv"
    path.write_text("submitted,length_s,wait_s\n0,10,90\n5,10,120\n")
    assert re.search(r"as it was +1.8 min +2.0 min", said("--load", str(path)))


def test_warm_hours_are_read() -> None:
    warm = found(*BURST, "--maximum", "5", "--warm", "MON-FRI 00:00-00:00 3", "--warm", "08:00-18:00 Europe/Berlin 2")
    assert warm[0]["scaling"]["warm"] == [
        {"days": ["MON", "TUE", "WED", "THU", "FRI"], "from": "00:00", "to": "00:00", "timezone": "UTC", "minimum": 3},
        {
            "days": ["MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN"],
            "from": "08:00",
            "to": "18:00",
            "timezone": "Europe/Berlin",
            "minimum": 2,
        },
    ]
    assert WarmTime().convert("SAT-MON,WED 01:00-02:00 1", None, None)["days"] == ["SAT", "SUN", "MON", "WED"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name a fleet, or a load by --synthetic or --load"),
        (("--since", "24h"), "--since and --until are about the load of a fleet: name it"),
        ((*BURST, "--load", "-"), "give one load: --synthetic, --load, or --since and --until"),
        ((*BURST, "--minimum", "3", "--maximum", "2"), "minimum is 3, over maximum, which is 2: raise maximum or lower minimum"),
        ((*BURST, "--maximum", "-1"), "--maximum: Input should be greater than or equal to 0"),
        ((*BURST, "--maximum", "many"), "Invalid value for '--maximum': 'many' is not a valid integer."),
        ((*BURST, "--target-wait", "nan"), "--target-wait: "),
        ((*BURST, "--maximum", "0"), "maximum is 0: no build would ever start"),
        ((*BURST, "--maximun", "2"), "No such option '--maximun'"),
        ((*BURST, "--what-if", "maximun=2"), "--what-if 'maximun' is no parameter; did you mean maximum?"),
        ((*BURST, "--what-if", "maximum"), "--what-if maximum has no values"),
        ((*BURST, "--what-if", "maximum=2,x"), "--what-if maximum: 'x' is not a valid integer."),
        (
            (*BURST, "--what-if", "maximum=2", "--minimum", "1", "--what-if", "minimum=3"),
            "minimum is 3, over maximum, which is 2",
        ),
        ((*BURST, "--what-if", "slots=0"), "--what-if slots: 0 is not in the range 1<=x<=256."),
        ((*BURST, "--what-if", "slots=1", "--what-if", "slots=2"), "--what-if names slots twice"),
        ((*BURST, "--what-if", f"slots={','.join(map(str, range(1, 100)))}"), "these are 99 variants, over the limit of 64"),
        ((*BURST, "--warm", "MON 8:00-18:00 4"), "'MON 8:00-18:00 4' is not like 'MON-FRI 08:00-18:00 Europe/Berlin 4'"),
        ((*BURST, "--warm", "25:00-18:00 1"), "--warm.0.from: String should match pattern"),
        ((*BURST, "--warm", "08:00-18:00 Europe/Rome 9"), "warm minimum is 9, over maximum, which is 1"),
        ((*BURST, "--maximum", "9", "--warm", "08:00-18:00 Mars 1"), "--warm.0.timezone: 'Mars' is no time zone"),
        (("--synthetic", "burst:many"), "burst is 'many', not a number of builds from 1 to 200000"),
        (("--load", "nowhere.csv"), "Invalid value for '--load': 'nowhere.csv': No such file or directory"),
    ],
)
def test_what_cannot_be_tried_is_said(words: tuple[str, ...], message: str) -> None:
    error = ran(*words).exception
    assert error is not None
    text = error.message if isinstance(error, MillraceError) else getattr(error, "format_message", lambda: repr(error))()
    assert message in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1: the columns are none"),
        (b"submitted,length_s\n0,ten\n", "line 2: length_s is 'ten'"),
        (b"submitted,length_s\n\xff\xfe,1\n", "this is no CSV text"),
        (b"submitted,length_s\n0,\x001\n", "line 2"),
    ],
)
def test_a_file_that_is_wrong_is_said(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "load.csv"
    path.write_bytes(content)
    error = ran("--load", str(path)).exception
    assert isinstance(error, MillraceError)
    assert message in error.message


def test_pictures_that_cannot_be_written_are_said(tmp_path: Path) -> None:
    for option in ("--svg", "--save-load"):
        error = ran(*BURST, option, str(tmp_path / "nowhere" / "a.file")).exception
        assert isinstance(error, MillraceError)
        assert "cannot be written" in error.message
