"""The courier file: what goes in comes out, everything else is refused in words."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.core.psrd import LaneSpan, LaneState, PsrdHeader, check_continues, check_parties
from mesh.core.sizes import format_size, parse_size
from mesh.errors import CallerError, ConfigError, ErrorReason, IntegrityError, MeshError, UnavailableError
from mesh.node.psrd_courier import read_passphrase
from mesh.sources import randomness
from mesh.sources.psrd_file import CourierReader, CourierWriter, wipe_bytes
from mesh.sources.randomness import DeviceRandom, SystemRandom, open_random
from tests.fakes.courier import PASSPHRASE, MemoryFile, courier_of, header_of, read_all


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
def test_a_table_comes_out_as_it_went_in(passphrase: bytes | None) -> None:
    header = header_of()
    data, table = courier_of(header, passphrase=passphrase)
    assert read_all(data, passphrase=passphrase) == (header, table)
    assert (table[:64] in data) == (passphrase is None)


def test_chunks_of_a_sealed_file_end_on_the_boundary_too() -> None:
    overhead = 2 + len(header_of().encode()) + 32 + 16
    header = header_of(to_hub=3 * 4096 - overhead)
    data, table = courier_of(header, passphrase=PASSPHRASE)
    assert (len(data) - 42) % (4096 + 16) == 0
    assert read_all(data, passphrase=PASSPHRASE) == (header, table)


def test_layout_is_the_documented_one() -> None:
    header = header_of()
    data, table = courier_of(header)
    encoded = header.encode()
    assert data[:8] == b"KMPSRD\x01\x00"
    assert int.from_bytes(data[8:10], "big") == len(encoded) == 80 + 4 + 6 + 6
    at = 10 + len(encoded)
    assert data[10:at] == encoded
    assert data[at + 32 : -16] == table
    assert encoded[24:28] == (1).to_bytes(4, "big")
    assert encoded[44:52] == (4096).to_bytes(8, "big")


def test_every_truncation_is_refused() -> None:
    data, _ = courier_of(header_of())
    for length in [*range(0, 160), *range(160, len(data), 97), len(data) - 1]:
        with pytest.raises(CallerError, match=r"truncated|not one|too short|malformed|damaged"):
            read_all(data[:length])


def test_truncation_says_so_and_bytes_behind_the_end_are_refused() -> None:
    data, _ = courier_of(header_of())
    with pytest.raises(CallerError, match="truncated; copy it again") as caught:
        CourierReader(MemoryFile(data[:-1]))
    assert caught.value.facts == {"missing_bytes_at_least": 1}
    with pytest.raises(CallerError, match="bytes after its end"):
        CourierReader(MemoryFile(data + b"\0"))


def test_every_truncation_of_a_sealed_file_is_refused() -> None:
    data, _ = courier_of(header_of(), passphrase=PASSPHRASE)
    whole = 4096 + 16
    for length in (
        0,
        7,
        8,
        20,
        41,
        42,
        43,
        60,
        42 + whole,
        42 + 2 * whole,
        42 + 2 * whole + 16,
        len(data) - 1,
    ):
        with pytest.raises(MeshError):
            read_all(data[:length], passphrase=PASSPHRASE)


def test_wrong_version_is_named() -> None:
    data = bytearray(courier_of(header_of())[0])
    data[6] = 2
    with pytest.raises(CallerError, match="version") as caught:
        read_all(bytes(data))
    assert caught.value.facts == {"version": 2, "known": 1}


def test_passphrases() -> None:
    clear, _ = courier_of(header_of())
    sealed, _ = courier_of(header_of(), passphrase=PASSPHRASE)
    with pytest.raises(CallerError, match="passphrase: the courier file has none"):
        read_all(clear, passphrase=b"x")
    with pytest.raises(CallerError, match="passphrase: the courier file is sealed"):
        read_all(sealed)
    with pytest.raises(CallerError, match="passphrase: does not open") as caught:
        read_all(sealed, passphrase=b"wrong")
    assert caught.value.reason is ErrorReason.NOT_AUTHORIZED
    with pytest.raises(CallerError, match="passphrase: is empty"):
        courier_of(header_of(), passphrase=b"")


def test_chunks_cannot_be_swapped() -> None:
    data, _ = courier_of(header_of(), passphrase=PASSPHRASE, chunk_log2=10)
    size = 1024 + 16
    one, two = data[42 + size : 42 + 2 * size], data[42 + 2 * size : 42 + 3 * size]
    swapped = data[: 42 + size] + two + one + data[42 + 3 * size :]
    with pytest.raises(IntegrityError, match="altered"):
        read_all(swapped, passphrase=PASSPHRASE)


def test_bits_of_the_key_that_poly1305_ignores_may_not_be_set() -> None:
    header = header_of()
    data = bytearray(courier_of(header)[0])
    data[10 + len(header.encode()) + 3] |= 0x80
    with pytest.raises(IntegrityError, match="altered"):
        read_all(bytes(data))


def test_writer_keeps_to_its_header() -> None:
    header = header_of()
    writer = CourierWriter(MemoryFile(), header, bytes(32))
    with pytest.raises(ValueError, match="fewer"):
        writer.finish()
    writer.write(bytes(header.total_bytes))
    with pytest.raises(ValueError, match="more"):
        writer.write(b"x")


def test_progress_rises_to_the_total() -> None:
    header = header_of()
    data, _ = courier_of(header)
    told: list[tuple[int, int]] = []
    reader = CourierReader(MemoryFile(data), progress=lambda done, total: told.append((done, total)))
    reader.read(4096)
    reader.read(5000)
    reader.finish()
    assert told == [(4096, 9096), (9096, 9096)]


def test_wiping_leaves_zeros_on_disk() -> None:
    file = MemoryFile(courier_of(header_of())[0])
    size = file.size()
    wipe_bytes(file)
    assert file.data == b"KMPSRD" + bytes(size - 6)
    assert file.is_synced


def test_headers_are_strict() -> None:
    header = header_of()
    encoded = header.encode()
    assert PsrdHeader.decode(encoded) == header
    wrong = [
        encoded[:-1],
        encoded + b"\0",
        replace(header, hub_id="kme-a").encode(),
        replace(header, hub_id="Hub").encode(),
        replace(header, from_hub=LaneSpan(1, 5, 4, 4096)).encode(),
        replace(header, to_hub=LaneSpan(1, 0, 0, 4095)).encode(),
        replace(header, to_hub=LaneSpan(1, 0, 1 << 62, 4096)).encode(),
    ]
    for one in wrong:
        with pytest.raises(CallerError, match=r"courier file: .* fetch it again"):
            PsrdHeader.decode(one)


def test_parties_are_checked() -> None:
    header = header_of()
    check_parties(header, domain_id="lab", own_id="kme-a", peer_id="hub-1")
    for field, parties in (
        ("domain", ("other", "kme-a", "hub-1")),
        ("client", ("lab", "kme-b", "hub-1")),
        ("hub", ("lab", "kme-a", "hub-2")),
    ):
        with pytest.raises(CallerError, match=f"wrong {field}"):
            check_parties(header, domain_id=parties[0], own_id=parties[1], peer_id=parties[2])


def test_a_table_continues_its_lane_exactly_or_not_at_all() -> None:
    span = LaneSpan(1, 8192, 8192, 4096)
    assert check_continues(span, LaneState(1, 8192, is_unused=False), "x") is False
    with pytest.raises(CallerError, match="imported already"):
        check_continues(span, LaneState(1, 12288, is_unused=False), "x")
    with pytest.raises(CallerError, match="earlier file of this hub is missing"):
        check_continues(span, LaneState(1, 4096, is_unused=False), "x")
    with pytest.raises(CallerError, match="epoch is older"):
        check_continues(span, LaneState(2, 8192, is_unused=True), "x")
    first = LaneSpan(2, 0, 0, 4096)
    assert check_continues(first, LaneState(1, 0, is_unused=True), "x") is True
    with pytest.raises(CallerError, match="reset it here too"):
        check_continues(first, LaneState(1, 8192, is_unused=False), "x")
    with pytest.raises(CallerError, match="earlier file"):
        check_continues(LaneSpan(2, 4096, 4096, 4096), LaneState(1, 0, is_unused=True), "x")
    assert LaneSpan(1, 10, 10, 4096).hole is None
    hole = LaneSpan(1, 10, 20, 4096).hole
    assert hole is not None
    assert (hole.start, hole.stop) == (10, 20)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("64MiB", 64 << 20),
        ("64 mib", 64 << 20),
        ("1.5GB", 1_500_000_000),
        ("0.5KiB", 512),
        ("2TiB", 2 << 40),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "64MB/s", "-1", "1e6", "64 PiB", "0x10", "٦٤"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(CallerError, match="size: not a size; give a number and a unit"):
        parse_size(text)


def test_sizes_read_well() -> None:
    assert [format_size(one) for one in (0, 1023, 1536, 64 << 20, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "64.0 MiB",
        "3.0 TiB",
    ]


def test_random_sources(tmp_path: Path) -> None:
    source = open_random("os")
    assert isinstance(source, SystemRandom)
    assert len(source.read(100)) == 100
    device = open_random("/dev/urandom")
    assert isinstance(device, DeviceRandom)
    assert len(device.read(3 << 20)) == 3 << 20
    device.close()
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(100))
    with pytest.raises(ConfigError, match="not a device file"):
        open_random(str(plain))
    with pytest.raises(ConfigError, match="cannot be opened"):
        open_random(str(tmp_path / "none"))


def test_a_stuck_or_ended_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="repeats itself"):
        open_random("/dev/zero").read(4096)
    with pytest.raises(UnavailableError, match="ended"):
        open_random("/dev/null").read(64)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    keeper = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    block = random.Random(1).randbytes(64)
    os.write(keeper, block + block)
    source = open_random(str(pipe))
    assert source.read(64) not in (block, bytes(64))
    with pytest.raises(UnavailableError, match="repeats itself"):
        source.read(64)
    os.close(keeper)


def test_nothing_waits_for_a_pipe_or_a_device_that_stalls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_passphrase(str(pipe))
    with pytest.raises(UnavailableError, match="ended"):
        open_random(str(pipe)).read(64)
    keeper = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    source = open_random(str(pipe))
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(source.read, 64)
        source.close()
        with pytest.raises(UnavailableError, match="was closed"):
            reading.result(timeout=5)
    monkeypatch.setattr(randomness, "_STALL_S", 0.05)
    with pytest.raises(UnavailableError, match="gave nothing"):
        open_random(str(pipe)).read(64)
    os.close(keeper)
