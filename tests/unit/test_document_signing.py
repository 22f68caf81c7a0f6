"""The signature and the serial: forged, altered, older and foreign documents are refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mesh.directory import tool
from mesh.directory.document import (
    MAX_DOCUMENT_BYTES,
    DocumentKeeper,
    Verdict,
    decode_body,
    encode_body,
    load_private_key,
    load_public_key,
    read_source,
    sign,
    split,
    verify,
)
from mesh.errors import ConfigError, ErrorReason, IntegrityError, MeshError

OPERATOR = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(32))


def source(serial: int = 1, home: str = "kme-a", domain: str = "toronto") -> dict[str, Any]:
    return {
        "format": "keymesh-network/1",
        "serial": serial,
        "domain": domain,
        "nodes": {"kme-a": {}, "kme-b": {}},
        "links": [{"between": ["kme-a", "kme-b"]}],
        "saes": {"sae-a": home},
    }


def signed(
    serial: int = 1, home: str = "kme-a", domain: str = "toronto", key: Ed25519PrivateKey = OPERATOR
) -> bytes:
    return sign(encode_body(source(serial, home, domain)), key)


class Alarms:
    def __init__(self) -> None:
        self.refused: list[tuple[str, ErrorReason]] = []

    def __call__(self, origin: str, error: MeshError) -> None:
        self.refused.append((origin, error.reason))


def keeper(**options: Any) -> DocumentKeeper:
    return DocumentKeeper("toronto", operator_key=OPERATOR.public_key(), **options)


def test_what_was_signed_verifies() -> None:
    body = encode_body(source())
    assert verify(sign(body, OPERATOR), OPERATOR.public_key()) == body
    assert decode_body(body).home("sae-a") == "kme-a"


def test_every_altered_byte_of_the_document_breaks_the_signature() -> None:
    data = signed()
    start = data.index(b"\n\n") + 2
    for at in range(start, len(data), 7):
        altered = bytearray(data)
        altered[at] ^= 1
        with pytest.raises(IntegrityError) as caught:
            verify(bytes(altered), OPERATOR.public_key())
        assert caught.value.reason is ErrorReason.DOCUMENT_INVALID


def test_another_key_is_not_the_operators() -> None:
    with pytest.raises(IntegrityError, match="not the operator's"):
        verify(signed(key=STRANGER), OPERATOR.public_key())


def test_the_signer_line_decides_nothing() -> None:
    mine, theirs = split(signed()), split(signed(key=STRANGER))
    lied = signed(key=STRANGER).replace(theirs.signer.encode(), mine.signer.encode())
    with pytest.raises(IntegrityError):
        verify(lied, OPERATOR.public_key())


def test_a_bare_signature_over_the_body_does_not_count() -> None:
    # The context string keeps signatures made for something else out.
    body = encode_body(source())
    honest = split(sign(body, OPERATOR)).signature
    bare = OPERATOR.sign(body)
    assert honest != bare


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"keymesh-signed-network/1\n",
        b"keymesh-signed-network/2\nsigner: a\nsignature: AA==\n\n{}",
        b"keymesh-signed-network/1\nsigner: a\n\n{}",
        b"keymesh-signed-network/1\nsigner: a\nsignature: AA==\nmore: b\n\n{}",
        b"keymesh-signed-network/1\nsignature: AA==\nsigner: a\n\n{}",
        b"keymesh-signed-network/1\nsigner: a\nsignature: ???\n\n{}",
        b"keymesh-signed-network/1\nsigner: \xff\nsignature: AA==\n\n{}",
        b"{}",
    ],
)
def test_malformed_files_are_refused(data: bytes) -> None:
    with pytest.raises((ConfigError, IntegrityError)):
        verify(data, OPERATOR.public_key())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"nonsense",
        b'{"format": 1, "format": 2}',
        b'{"serial": NaN}',
        b"[" * 100_000,
        b"\xff",
        b"1" * 5000,
    ],
)
def test_malformed_bodies_are_refused(body: bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        decode_body(body)
    assert caught.value.reason is ErrorReason.DOCUMENT_INVALID


@pytest.mark.parametrize(
    "text", [b"a: &x 1\nb: *x", b"a: 1\na: 2", b"a: [", b"\xff", b"!!python/object:os.system x"]
)
def test_yaml_without_aliases_repeats_or_objects(text: bytes) -> None:
    with pytest.raises(ConfigError):
        read_source(text)


async def test_the_newest_document_wins_and_listeners_hear_of_it() -> None:
    held = keeper()
    heard: list[int] = []
    end = held.subscribe(lambda: heard.append(held.serial()))
    assert (held.serial(), held.document, held.data()) == (0, None, b"")
    assert await held.offer(signed(1)) is Verdict.ADOPTED
    assert await held.offer(signed(1)) is Verdict.KNOWN
    assert await held.offer(signed(3, home="kme-b")) is Verdict.ADOPTED
    assert held.document is not None
    assert held.document.home("sae-a") == "kme-b"
    assert held.data() == signed(3, home="kme-b")
    end()
    await held.offer(signed(4))
    assert heard == [1, 3]


async def test_protocol_5_1_a_lower_serial_is_refused_and_reported() -> None:
    alarms = Alarms()
    held = keeper(refused=alarms)
    await held.offer(signed(5))
    assert await held.offer(signed(4), "kme-b") is Verdict.OLDER
    assert held.serial() == 5
    assert alarms.refused == [("kme-b", ErrorReason.DOCUMENT_INVALID)]


async def test_protocol_5_1_a_remapped_home_without_the_operators_signature_is_refused() -> None:
    alarms = Alarms()
    held = keeper(refused=alarms)
    await held.offer(signed(1))
    unsigned = encode_body(source(9, home="kme-b"))
    altered = signed(1).replace(b'"sae-a": "kme-a"', b'"sae-a": "kme-b"')
    assert altered != signed(1)
    for forged in (unsigned, altered, signed(9, home="kme-b", key=STRANGER)):
        assert await held.offer(forged) is Verdict.REFUSED
    assert held.document is not None
    assert held.document.home("sae-a") == "kme-a"
    assert len(alarms.refused) == 3


async def test_two_documents_with_one_serial_are_refused() -> None:
    held = keeper()
    await held.offer(signed(1))
    assert await held.offer(signed(1, home="kme-b")) is Verdict.REFUSED
    assert held.document is not None
    assert held.document.home("sae-a") == "kme-a"


async def test_a_document_of_another_domain_is_refused() -> None:
    assert await keeper().offer(signed(1, domain="cambridge")) is Verdict.REFUSED


async def test_a_document_that_is_too_long_is_refused_before_it_is_read() -> None:
    assert await keeper().offer(bytes(MAX_DOCUMENT_BYTES + 1)) is Verdict.REFUSED


async def test_the_serial_is_saved_before_the_document_is_used() -> None:
    saved: list[tuple[int, int]] = []

    async def save(serial: int, data: bytes) -> None:
        await asyncio.sleep(0)
        saved.append((serial, held.serial()))

    held = keeper(save=save)
    await held.offer(signed(2))
    assert saved == [(2, 0)]


async def test_a_document_that_cannot_be_saved_is_not_used() -> None:
    async def save(serial: int, data: bytes) -> None:
        raise IntegrityError("disk broke")

    held = keeper(save=save)
    with pytest.raises(IntegrityError):
        await held.offer(signed(2))
    assert held.serial() == 0


async def test_the_serial_does_not_fall_across_a_restart() -> None:
    held = keeper()
    held.restore(signed(6), serial=6)
    assert held.serial() == 6
    assert await held.offer(signed(5)) is Verdict.OLDER


async def test_the_serial_does_not_fall_when_the_stored_document_no_longer_verifies() -> None:
    held = keeper()
    with pytest.raises(IntegrityError):
        held.restore(signed(6, key=STRANGER), serial=6)
    assert await held.offer(signed(5)) is Verdict.OLDER
    assert await held.offer(signed(7)) is Verdict.ADOPTED


async def test_a_pinned_document_is_taken_up_after_a_restart() -> None:
    held = DocumentKeeper("toronto")
    held.restore(encode_body(source(2)), serial=2)
    assert held.serial() == 2
    assert await held.pin(encode_body(source(1))) is Verdict.OLDER


async def test_offers_at_the_same_time_leave_the_highest_serial() -> None:
    async def save(serial: int, data: bytes) -> None:
        await asyncio.sleep(0)

    held = keeper(save=save)
    await asyncio.gather(*(held.offer(signed(serial)) for serial in (2, 9, 4, 7)))
    assert held.serial() == 9


async def test_labs_may_trust_the_directory_but_the_serial_still_never_falls() -> None:
    held = DocumentKeeper("toronto", trust_directory=True)
    assert held.trusts_directory
    assert await held.offer(encode_body(source(2))) is Verdict.ADOPTED
    assert await held.offer(signed(3, key=STRANGER)) is Verdict.ADOPTED
    assert await held.offer(encode_body(source(1))) is Verdict.OLDER


async def test_without_a_key_only_the_pinned_document_counts() -> None:
    held = DocumentKeeper("toronto")
    assert await held.offer(signed(9)) is Verdict.REFUSED
    assert await held.pin(encode_body(source(1))) is Verdict.ADOPTED
    assert await held.offer(signed(9)) is Verdict.REFUSED
    assert held.serial() == 1


async def test_a_malformed_pinned_document_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError):
        await DocumentKeeper("toronto").pin(b"{}")


def test_the_operators_commands_make_keys_sign_and_show(tmp_path: Path) -> None:
    private, public = tmp_path / "operator.pem", tmp_path / "operator.pub.pem"
    tool.generate_key(private, public)
    assert private.stat().st_mode & 0o777 == 0o600
    text = tmp_path / "network.yaml"
    text.write_text(
        "format: keymesh-network/1\nserial: 4\ndomain: toronto\nnodes: {kme-a: {}}\nsaes: {s1: kme-a}\n"
    )
    out = tmp_path / "network.signed"
    assert "serial 4" in tool.sign_file(text, private, out)
    assert "signature verified" in tool.show_file(out, public)
    assert "NOT CHECKED" in tool.show_file(out, None)
    assert "NOT SIGNED" in tool.show_file(text, None)
    assert tool.list_saes(out) == "s1  kme-a"
    with pytest.raises(ConfigError, match="exists"):
        tool.generate_key(private, public)
    other = tmp_path / "other.pub.pem"
    tool.generate_key(tmp_path / "other.pem", other)
    with pytest.raises(IntegrityError):
        tool.show_file(out, other)


def test_signing_checks_the_document_first() -> None:
    with pytest.raises(ConfigError, match="domain"):
        tool.sign_source(b"format: keymesh-network/1\nserial: 1\nnodes: {a: {}}\n", OPERATOR)


def test_only_ed25519_keys_are_taken(tmp_path: Path) -> None:
    other = generate_private_key(SECP256R1())
    private = other.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = other.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for data in (private, b"", b"nonsense", public):
        with pytest.raises(ConfigError):
            load_private_key(data)
    for data in (public, b"", private):
        with pytest.raises(ConfigError):
            load_public_key(data)
    with pytest.raises(ConfigError, match="cannot read"):
        tool.show_file(tmp_path / "missing", None)
