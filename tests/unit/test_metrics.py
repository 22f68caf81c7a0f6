"""Metrics that follow levels and counts kept elsewhere, and when certificates end."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mesh import __version__
from mesh.node.userate import UseRate
from mesh.ops.certificate_expiry import CertificateExpiry
from mesh.ops.metrics import Followed, Levels, Metrics
from mesh.pki.authority import Pki


def shown(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Samples of a page: name and label values (in the order of their names) to value."""
    return {
        (sample.name.removeprefix("keymesh_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def test_a_page_names_the_release() -> None:
    assert shown(Metrics(with_process=False)) == {("build_info", __version__): 1}


def test_levels_of_what_is_gone_are_taken_off() -> None:
    metrics = Metrics(with_process=False)
    levels = Levels(metrics.gauge("held", "x", ["peer"]), metrics.gauge("aim", "x", ["peer"]))
    levels.show({("kme-b",): (1, 2), ("kme-c",): (3, 4)})
    levels.show({("kme-c",): (5, 4)})
    levels.show({("kme-c",): (6, 4)})
    assert shown(metrics) == {
        ("build_info", __version__): 1,
        ("held", "kme-c"): 6,
        ("aim", "kme-c"): 4,
    }


def test_a_counter_follows_a_count_and_survives_its_fall() -> None:
    metrics = Metrics(with_process=False)
    followed = Followed(metrics.counter("bad", "x", ["peer"]))
    for count in (3, 3, 5, 1):
        followed.follow(count, "kme-b")
    assert shown(metrics)["bad_total", "kme-b"] == 6


def test_a_rate_of_use_halves_in_a_minute_and_says_how_long_the_rest_lasts() -> None:
    use = UseRate()
    use.look(1000, 0.0)
    assert math.isinf(use.seconds_to_empty(10))
    for second in range(1, 1201):
        use.look(1000 + 100 * second, 1.0)
    assert use.bytes_per_s == pytest.approx(100, rel=0.01)
    assert use.seconds_to_empty(50_000) == pytest.approx(500, rel=0.01)
    use.look(121_000, 60.0)
    assert use.bytes_per_s == pytest.approx(50, rel=0.01)
    use.look(0, 1.0)  # a lane that was thrown away: no use of minus a hundred kilobytes
    assert use.bytes_per_s == pytest.approx(50, rel=0.01)
    use.look(0, 3600.0)
    assert math.isinf(use.seconds_to_empty(1))


def test_certificates_are_followed_and_of_roots_the_last_to_end_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = Pki.create("old"), Pki.create("new")
    old.save(tmp_path / "old")
    new.save(tmp_path / "new")
    leaf = new.node("kme-a").save(tmp_path / "new", "kme-a")
    both = tmp_path / "roots.pem"
    both.write_bytes((tmp_path / "old" / "node-ca.pem").read_bytes())
    metrics = Metrics(with_process=False)
    expiry = CertificateExpiry(
        metrics, {"node": leaf.cert, "etcd": tmp_path / "none.pem"}, {"node-root": both}
    )
    name = "certificate_expiry_timestamp_seconds"
    first = shown(metrics)
    in_397_days = datetime.now(UTC) + timedelta(days=397)
    assert first[name, "node"] == pytest.approx(in_397_days.timestamp(), abs=3600)
    assert first[name, "etcd"] == 0
    both.write_bytes(both.read_bytes() + leaf.cert.read_bytes())
    monkeypatch.setattr(expiry._watch, "_next_s", 0.0)
    expiry.sample()
    assert shown(metrics)[name, "node-root"] == first[name, "node-root"] > first[name, "node"]
    both.write_text("no certificate")
    monkeypatch.setattr(expiry._watch, "_next_s", 0.0)
    expiry.sample()
    assert shown(metrics)[name, "node-root"] == 0
