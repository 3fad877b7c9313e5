"""What builds need and workers offer: keys that say all, and what fits what."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from millrace.need import GIB, LABEL, Need, Offer
from millrace.project import ProjectEnvironment
from tests.support.records import a_project_json

LABELS = st.frozensets(st.from_regex(LABEL, fullmatch=True).filter(str.isprintable), max_size=4)
NEEDS = st.builds(Need, cpu_millis=st.integers(0, 10**6), memory_bytes=st.integers(0, 2**50), labels=LABELS)


def environment(**changes: object) -> ProjectEnvironment:
    return ProjectEnvironment.model_validate({**a_project_json()["environment"], **changes})


@given(NEEDS)
def test_a_key_says_all_of_a_need(need: Need) -> None:
    assert Need.parse(need.key) == need


@pytest.mark.parametrize("key", ["", "2000", "2000/x/", "-1/2/", "/1/gpu", "9999999999999/1/"])
def test_a_damaged_key_is_no_need(key: str) -> None:
    assert Need.parse(key) is None


@given(NEEDS, st.lists(NEEDS, max_size=4), NEEDS)
def test_what_is_left_holds_what_all_of_it_held_together(offer: Need, held: list[Need], more: Need) -> None:
    whole = Offer(cpu_millis=offer.cpu_millis, memory_bytes=offer.memory_bytes, labels=offer.labels)
    together = Need(
        cpu_millis=sum(one.cpu_millis for one in [*held, more]),
        memory_bytes=sum(one.memory_bytes for one in [*held, more]),
        labels=more.labels,
    )
    assert whole.less(held).holds(more) == whole.holds(together)


def test_an_offer_without_numbers_bounds_nothing_but_labels() -> None:
    huge = Need(cpu_millis=10**8, memory_bytes=2**50)
    assert Offer().holds(huge)
    assert Offer().key == ""
    assert not Offer().holds(Need(cpu_millis=0, memory_bytes=0, labels=frozenset({"gpu"})))
    assert Offer.of(2, None, ["b", "a"]).key == "2000//a,b"


@pytest.mark.parametrize(
    ("changes", "need"),
    [
        ({}, (2000, 4 * GIB, ())),
        ({"computeType": "BUILD_GENERAL1_2XLARGE"}, (72_000, 144 * GIB, ())),
        ({"computeType": "ATTRIBUTE_BASED_COMPUTE", "computeConfiguration": {"vCpu": 3}}, (3000, 6 * GIB, ())),
        ({"computeType": "ATTRIBUTE_BASED_COMPUTE", "computeConfiguration": {"memory": 7}}, (4000, 7 * GIB, ())),
        ({"computeType": "ATTRIBUTE_BASED_COMPUTE", "computeConfiguration": {"vCpu": 1, "memory": 16}}, (1000, 16 * GIB, ())),
        ({"computeConfiguration": {"vCpu": 64}}, (2000, 4 * GIB, ())),
        (
            {
                "computeType": "CUSTOM_INSTANCE_TYPE",
                "computeConfiguration": {"instanceType": "m5.large"},
                "workerLabels": ["ssd"],
            },
            (2000, 4 * GIB, ("instance-type=m5.large", "ssd")),
        ),
    ],
)
def test_a_compute_type_becomes_a_need(changes: dict[str, object], need: tuple[int, int, tuple[str, ...]]) -> None:
    cpu, memory, labels = need
    assert environment(**changes).need == Need(cpu_millis=cpu, memory_bytes=memory, labels=frozenset(labels))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"computeType": "ATTRIBUTE_BASED_COMPUTE"}, "computeType"),
        ({"computeType": "ATTRIBUTE_BASED_COMPUTE", "computeConfiguration": {"disk": 10}}, "computeType"),
        ({"computeType": "CUSTOM_INSTANCE_TYPE", "computeConfiguration": {"vCpu": 2}}, "computeType"),
        ({"computeConfiguration": {"vCpu": 0}}, "computeConfiguration"),
        ({"workerLabels": ["a b"]}, "workerLabels"),
        ({"workerLabels": ["x"] * 11}, "workerLabels"),
        ({"computeType": "BUILD_LAMBDA_1GB"}, "computeType"),
    ],
)
def test_what_says_no_size_is_refused_by_field(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        environment(**changes)
    assert [error["loc"][0] for error in caught.value.errors()] == [field]
