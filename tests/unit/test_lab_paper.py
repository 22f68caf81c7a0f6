"""The paper run without a lab: the ocean's width, the result file's fields, mismatches, the picture."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import cast

import pytest

from mesh.errors import ConfigError, UnavailableError
from mesh.lab import paper
from mesh.lab.encryptor import Encryptor, FetchedKey, RefusedError
from mesh.lab.networks import Lab, load_lab, load_network
from mesh.lab.paper import ROUND_TRIP_MS, Mode, Paper, goals_line, with_round_trip
from mesh.lab.paper_picture import Series, draw_paper
from mesh.lab.state import LabDirectory

FIELDS = {"n", "mean_ms", "std_ms", "p50_ms", "p99_ms", "round_trip_ms", "floor_ms", "mismatches"}


@pytest.mark.parametrize("round_trip_ms", [ROUND_TRIP_MS, 20.0, 300.0])
def test_the_ocean_may_be_wider_and_lies_between_the_two_dske_nodes_only(round_trip_ms: float) -> None:
    can, dske, uk = with_round_trip(load_lab("paper"), round_trip_ms).domains
    assert 2 * dske.delay_ms("dske-can-site-z", "dske-uk-site-x") == pytest.approx(round_trip_ms)
    for hub in dske.hubs:
        way_ms = [link.one_way_delay_ms for link in dske.links if hub.id in link.between]
        assert 2 * sum(way_ms) == pytest.approx(round_trip_ms)
    assert not any(link.one_way_delay_ms for network in (can, uk) for link in network.links)


def test_a_lab_without_an_ocean_has_no_round_trip() -> None:
    with pytest.raises(ConfigError, match="no ocean"):
        with_round_trip(Lab.of(load_network("metro")), 85.0)


def test_the_papers_rates_and_grade() -> None:
    can, dske, uk = load_lab("paper").domains
    assert [link.rate_bps for link in can.links] == [3_950_000, 2_890_000]
    assert [link.rate_bps for link in uk.links] == [352_000, 741_000]
    assert str(dske.document().policy("dske-can-site-z", "dske-uk-site-x").grade) == "dske(2,2)"


def test_a_mode_has_exactly_the_fields_of_the_result_file() -> None:
    mode = Mode(samples=[(0.0, 100.0), (1.0, 110.0)], floors_ms=[85.1, 85.5, 90.0], mismatches=1)
    result = mode.result(85.0)
    assert result.keys() == FIELDS
    assert (result["n"], result["mean_ms"], result["p50_ms"]) == (2, 105.0, 105.0)
    assert (result["floor_ms"], result["round_trip_ms"], result["mismatches"]) == (85.5, 85.0, 1)


class End:
    """An encryptor at a gateway that answers as told."""

    def __init__(self, answer: FetchedKey | None) -> None:
        self._answer = answer

    def enc_keys(self, slave: str) -> list[FetchedKey]:
        return self._given()

    def dec_keys(self, master: str, key_ids: list[str]) -> list[FetchedKey]:
        return self._given()

    def _given(self) -> list[FetchedKey]:
        if self._answer is None:
            raise RefusedError(400, b"")
        return [self._answer]


@pytest.mark.parametrize(
    ("fetched", "mismatches"),
    [
        (FetchedKey("id", b"key"), 0),
        (FetchedKey("id", b"other"), 1),
        (FetchedKey("another", b"key"), 1),
        (None, 1),
    ],
)
def test_keys_that_differ_or_are_missing_at_one_end_count(
    tmp_path: Path, fetched: FetchedKey | None, mismatches: int
) -> None:
    run = Paper(tmp_path, duration_s=1.0, round_trip_ms=85.0)
    enc, dec = Mode(), Mode()
    a, b = (cast("Encryptor", End(answer)) for answer in (FetchedKey("id", b"key"), fetched))
    run._exchange(a, b, enc, dec)
    assert enc.mismatches == mismatches
    assert (len(enc.samples), len(dec.samples), enc.refused) == (1, 1, 0)


class Ocean:
    """An echo that takes no time."""

    def __init__(self, place: str) -> None:
        self.samples_ms: list[float] = []

    def measure(self) -> None:
        self.samples_ms.append(1.0)

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Paper, LabDirectory]:
    """A run whose ends refuse every call."""
    monkeypatch.setattr(paper, "Echo", Ocean)
    monkeypatch.setattr(paper, "_ocean", lambda lab: {"echo": "nowhere:1"})
    monkeypatch.setattr(paper, "encryptor", lambda lab, sae: nullcontext(End(None)))
    monkeypatch.setattr(paper, "_PAUSE_S", 0.001)
    directory = LabDirectory(tmp_path)
    directory.lab_file.write_text("{}")
    return Paper(tmp_path, duration_s=0.05, round_trip_ms=85.0), directory


def test_a_run_without_a_single_key_ends(
    run: tuple[Paper, LabDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper, "_FIRST_KEY_S", 0.05)
    with pytest.raises(UnavailableError, match="not one key"):
        run[0]._measure(run[1], "enc_on_demand")


@pytest.mark.parametrize(("keys", "refused", "is_good"), [(99, 1, True), (98, 2, False), (1, 1000, False)])
def test_a_run_of_which_much_was_refused_fails(keys: int, refused: int, is_good: bool) -> None:
    mode = Mode(samples=[(0.0, 1.0)] * keys, refused=refused)
    with nullcontext() if is_good else pytest.raises(UnavailableError, match="one call in a hundred"):
        mode.check_refused("enc_reserve")


def test_the_last_line_says_which_goals_were_met() -> None:
    line = goals_line({"enc_on_demand": 105.0, "enc_reserve": 98.5}, 85.0)
    assert "reserves empty, p50 at most the round trip + 20 ms: met" in line
    assert "+ 12 ms: missed by 1.5 ms" in line
    assert "keymesh lab trace" in line


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    series = [
        Series(name, name, [(float(at), ms + at) for at in range(20)])
        for name, ms in (("enc_on_demand", 100.0), ("enc_reserve", 95.0), ("enc_buffered", 2.0), ("dec", 1.5))
    ]
    path = tmp_path / "latency.png"
    draw_paper(series, round_trip_ms=85.0, note="on one machine", path=path)
    assert path.read_bytes().startswith(b"\x89PNG")
