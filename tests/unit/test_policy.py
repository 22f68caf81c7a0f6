"""Access, limits, quotas and water marks: deny by default, bounds named, time as an argument."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.core.policy import AccessTable, Limits, Quotas, Rate, TokenBucket, WaterMarks, check_registered
from mesh.errors import CallerError, ConfigError, ErrorReason, NotAuthorizedError, ShortageError

TABLE = {
    "rules": [
        {"saes": ["enc-1"], "peers": ["enc-2"], "max_keys_per_request": 4, "max_key_size_bytes": 32},
        {"saes": ["enc-*"], "peers": ["enc-*"], "rate": {"bytes_per_s": 100, "burst_bytes": 1000}},
    ]
}


def test_an_empty_table_denies_everybody() -> None:
    with pytest.raises(NotAuthorizedError):
        AccessTable().rule("a", "b")


def test_an_open_table_admits_everybody() -> None:
    assert AccessTable.open().rule("a", "b").rate is None


def test_the_first_rule_that_covers_the_pair_decides() -> None:
    table = AccessTable.parse(TABLE)
    assert table.rule("enc-1", "enc-2").max_keys_per_request == 4
    assert table.rule("enc-2", "enc-1").rate == Rate(100, 1000)
    with pytest.raises(NotAuthorizedError):
        table.rule("enc-1", "other")
    with pytest.raises(NotAuthorizedError):
        table.rule("other", "enc-1")


def test_a_rule_bounds_number_and_size() -> None:
    rule = AccessTable.parse(TABLE).rule("enc-1", "enc-2")
    rule.check(4, 32)
    for number, size in ((5, 32), (1, 33)):
        with pytest.raises(CallerError) as caught:
            rule.check(number, size)
        assert caught.value.reason is ErrorReason.LIMIT_EXCEEDED


@pytest.mark.parametrize(
    ("saes", "is_admitted"),
    [
        (None, True),
        (["app-1"], True),
        (["east-*", "app-*"], True),
        (["*"], True),
        (["app"], False),
        ([], False),
    ],
)
def test_a_gateway_speaks_for_the_saes_registered_to_it(saes: list[str] | None, is_admitted: bool) -> None:
    if is_admitted:
        check_registered(saes, "app-1")
    else:
        with pytest.raises(NotAuthorizedError):
            check_registered(saes, "app-1")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ([], "mapping"),
        ({}, "rules"),
        ({"rules": "all"}, "rules"),
        ({"rules": [], "default": "allow"}, "default"),
        ({"rules": [{"saes": ["a"]}]}, "rules[0].peers"),
        ({"rules": [{"saes": [], "peers": ["b"]}]}, "rules[0].saes"),
        ({"rules": [{"saes": [1], "peers": ["b"]}]}, "rules[0].saes"),
        ({"rules": [{"saes": ["a b"], "peers": ["b"]}]}, "rules[0].saes"),
        ({"rules": [{"saes": ["a"], "peers": ["b"], "max_keys_per_request": 0}]}, "max_keys_per_request"),
        ({"rules": [{"saes": ["a"], "peers": ["b"], "rate": {"bytes_per_s": -1}}]}, "rate.bytes_per_s"),
        (
            {"rules": [{"saes": ["a"], "peers": ["b"], "rate": {"bytes_per_s": 1, "burst_bytes": 0}}]},
            "burst_bytes",
        ),
        ({"rules": [{"saes": ["a"], "peers": ["b"], "sizes": 1}]}, "sizes"),
    ],
)
def test_a_malformed_table_is_refused_by_field(data: Any, named: str) -> None:
    with pytest.raises(CallerError) as caught:
        AccessTable.parse(data)
    assert named in str(caught.value)


def test_limits_are_the_contracts() -> None:
    limits = Limits()
    assert limits.check(1, None) == 32
    assert limits.check(128, 8192) == 8192
    assert limits.check(1, 1) == 1


@pytest.mark.parametrize(("number", "size", "more"), [(129, 32, 0), (1, 8193, 0), (1, 0, 0), (1, 32, 9)])
def test_requests_beyond_the_limits_are_refused(number: int, size: int, more: int) -> None:
    with pytest.raises(CallerError) as caught:
        Limits().check(number, size, more)
    assert caught.value.reason is ErrorReason.LIMIT_EXCEEDED


def test_the_total_of_a_call_is_bounded_too() -> None:
    with pytest.raises(CallerError, match="number times size"):
        Limits(max_call_bytes=100).check(4, 32)


@pytest.mark.parametrize("number", [0, -1])
def test_a_number_below_one_is_an_invalid_argument(number: int) -> None:
    with pytest.raises(CallerError) as caught:
        Limits().check(number, 32)
    assert caught.value.reason is ErrorReason.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "fields", [{"min_key_size_bytes": 64}, {"max_key_size_bytes": 9000}, {"max_call_bytes": 0}]
)
def test_limits_that_contradict_each_other_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Limits(**fields)


def test_a_bucket_refills_with_time_and_says_when_to_retry() -> None:
    bucket = TokenBucket(Rate(10, 100))
    bucket.take(100, now_s=5.0)
    with pytest.raises(ShortageError) as caught:
        bucket.take(30, now_s=6.0)
    assert caught.value.reason is ErrorReason.QUOTA_EXCEEDED
    assert caught.value.retry_after_s == pytest.approx(2.0)
    bucket.take(30, now_s=8.0)


def test_a_clock_that_jumps_back_refills_nothing_and_blocks_nothing() -> None:
    bucket = TokenBucket(Rate(10, 100))
    bucket.take(100, now_s=1000.0)
    with pytest.raises(ShortageError):
        bucket.take(10, now_s=0.0)
    bucket.take(10, now_s=1.0)


def test_what_can_never_fit_is_the_callers_fault() -> None:
    with pytest.raises(CallerError):
        TokenBucket(Rate(10, 100)).take(101, now_s=0.0)


def test_quotas_are_per_pair_and_bounded_in_number() -> None:
    quotas = Quotas(max_buckets=2)
    rate = Rate(1, 10)
    quotas.take("a", "b", rate, 10, 0.0)
    quotas.take("b", "a", rate, 10, 0.0)
    with pytest.raises(ShortageError):
        quotas.take("a", "b", rate, 1, 0.0)
    quotas.take("c", "d", rate, 10, 0.0)  # drops the bucket of (b, a), the longest unused
    quotas.take("b", "a", rate, 10, 0.0)
    quotas.take("a", "b", None, 10**9, 0.0)


def test_refilling_runs_from_below_low_to_high() -> None:
    marks = WaterMarks(high_bytes=100, low_bytes=40)
    assert marks.wanted(40, 0) == 0
    assert marks.wanted(39, 0) == 61
    assert marks.wanted(60, 10) == 30
    assert marks.wanted(100, 0) == 0
    assert marks.wanted(60, 0) == 0


def test_an_empty_reserve_is_refilled_even_with_the_low_mark_at_zero() -> None:
    assert WaterMarks(high_bytes=100, low_bytes=0).wanted(0, 0) == 100


def test_water_marks_must_be_ordered() -> None:
    with pytest.raises(ConfigError):
        WaterMarks(high_bytes=1, low_bytes=2)
