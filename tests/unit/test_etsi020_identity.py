"""Which certificate is whose at a border: that peer's authority, and its name or fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from gateway.config import KeyManager
from gateway.etsi020.identity import Pins
from mesh.client import ConfigError, NotAuthorizedError
from mesh.ops.certificates import fingerprint_of
from mesh.pki.authority import Credential, Pki

NAME = "kme-u.border.uk.keymesh.internal"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the authorities' roots lie."""
    return tmp_path_factory.mktemp("roots")


@pytest.fixture(scope="module")
def roots(base: Path) -> dict[str, Pki]:
    """Two owners' authorities."""
    found = {name: Pki.create(name) for name in ("uk", "third")}
    for name, pki in found.items():
        pki.save(base / name)
    return found


def peer(kme_id: str, owner: str, **pins: Any) -> KeyManager:
    return KeyManager(kme_id=kme_id, url="https://kme.example", ca=f"{owner}/border-ca.pem", **pins)


def der(credential: Credential) -> bytes:
    return credential.certificate.public_bytes(Encoding.DER)


def test_a_peer_is_known_by_its_authority_and_its_name(roots: dict[str, Pki], base: Path) -> None:
    pins = Pins([peer("u", "uk", names=[NAME.upper()]), peer("t", "third", names=["kme-t"])], base=base)
    caller = pins.identify(der(roots["uk"].border("kme-u")))
    assert caller.caller_id == "u"
    assert pins.of("u").fits(roots["uk"].border("kme-u").certificate)
    for stranger in (
        roots["uk"].border("kme-v"),
        roots["uk"].border("kme-v", hosts=["kme-t"]),  # one peer's authority does not speak for another
        roots["third"].border("kme-u", hosts=[NAME]),
        roots["uk"].sae("kme-u"),
    ):
        with pytest.raises(NotAuthorizedError):
            pins.identify(der(stranger))
    with pytest.raises(NotAuthorizedError):
        pins.identify(b"no certificate")


def test_a_fingerprint_pins_one_certificate(roots: dict[str, Pki], base: Path) -> None:
    pinned = roots["uk"].border("kme-u")
    text = fingerprint_of(pinned.certificate).upper()
    pins = Pins(
        [peer("u", "uk", fingerprints=[":".join(text[at : at + 2] for at in range(0, 64, 2))])], base=base
    )
    assert pins.identify(der(pinned)).caller_id == "u"
    with pytest.raises(NotAuthorizedError):
        pins.identify(der(roots["uk"].border("kme-u")))


def test_a_certificate_of_two_peers_is_nobodys(roots: dict[str, Pki], base: Path) -> None:
    pins = Pins([peer("u", "uk", names=[NAME]), peer("v", "uk", names=["other"])], base=base)
    with pytest.raises(NotAuthorizedError):
        pins.identify(der(roots["uk"].border("kme-u", hosts=["other"])))


@pytest.mark.parametrize(
    ("peers", "words"),
    [
        ([peer("u", "uk")], "names or fingerprints"),
        ([peer("u", "uk", fingerprints=["ab"])], "64 digits"),
        ([peer("u", "nowhere", names=[NAME])], "ca cannot be read"),
        ([peer("u", "uk", names=["a"]), peer("u", "uk", names=["b"])], "twice"),
    ],
)
def test_pins_that_are_none_are_refused_in_words(
    roots: dict[str, Pki], base: Path, peers: list[KeyManager], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Pins(peers, base=base)
