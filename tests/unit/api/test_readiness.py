"""Readiness: quick, whatever the parts do, and no burden on them."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from api.readiness import Readiness, silent
from millrace.errors import Unavailable


def test_each_part_says_how_it_is() -> None:
    def away() -> None:
        raise Unavailable("gone fishing")

    look = Readiness({"a": silent(lambda: None), "b": silent(away), "c": lambda: "so so"}).look
    assert look() == {"a": None, "b": "gone fishing", "c": "so so"}


def test_many_who_ask_are_one_to_the_parts() -> None:
    asked = []
    readiness = Readiness({"a": silent(lambda: asked.append(1))})
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(lambda _: readiness.look(), range(200))) == [{"a": None}] * 200
    assert len(asked) <= 2


def test_a_part_that_hangs_is_named_and_asked_once() -> None:
    let_go = threading.Event()
    asked = []

    def hang() -> None:
        asked.append(1)
        let_go.wait(10)

    readiness = Readiness({"good": silent(lambda: None), "bad": silent(hang)}, patience_s=0.05)
    began = time.monotonic()
    for _ in range(3):
        assert readiness.look() == {"good": None, "bad": "does not answer"}
    assert time.monotonic() - began < 2
    assert len(asked) == 1
    let_go.set()
