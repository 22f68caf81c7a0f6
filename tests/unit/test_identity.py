"""One spelling per identity, and one identity per certificate."""

from __future__ import annotations

import pytest
from cryptography import x509

from mesh.errors import CallerError, ErrorReason, NotAuthorizedError
from mesh.ops.denylist import DenyList
from mesh.pki.authority import Authority, Credential, Pki
from mesh.rpc.identity import Identity, PeerReader, Role, identity_of, parse_identity
from mesh.rpc.roles import ADMITTED, require_admitted
from mesh.v1 import admin_pb2, border_pb2, keys_pb2, link_pb2, peer_pb2

URI = "keymesh://metro/node/kme-a"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("test root")


@pytest.fixture(scope="module")
def pki() -> Pki:
    return Pki.create("metro")


def issued(
    authority: Authority, *, uris: tuple[str, ...] = (), hosts: tuple[str, ...] = ()
) -> x509.Certificate:
    return authority.issue(
        "x", kind="test", uris=uris, hosts=hosts, is_server=False, is_client=True
    ).certificate


def auth_context(credential: Credential) -> dict[str, list[bytes]]:
    return {"x509_pem_cert": [credential.cert_pem]}


def test_uri_and_pinned_name() -> None:
    identity = Identity("metro", Role.NODE, "kme-a")
    assert identity.uri == URI
    assert identity.dns_name == "kme-a.node.metro.keymesh.internal"
    assert parse_identity(identity.uri) == identity


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "keymesh://metro/node/kme-a/",
        "keymesh://metro/node/kme-a?x=1",
        "keymesh://metro/node/kme-a#f",
        "keymesh://u@metro/node/kme-a",
        "keymesh://metro:1/node/kme-a",
        "KEYMESH://metro/node/kme-a",
        "keymesh://metro/node/KME-A",
        "keymesh://metro/node/kme%2da",
        "keymesh://metro/node/",
        "keymesh://metro/root/kme-a",
        "keymesh://metro/node/kme-a\n",
        "keymesh://metro/node/-a",
        "keymesh://metro/node/kmé",
        f"keymesh://metro/node/{'a' * 64}",
        " keymesh://metro/node/kme-a",
    ],
)
def test_any_other_spelling_is_refused(uri: str) -> None:
    with pytest.raises(CallerError):
        parse_identity(uri)


@pytest.mark.parametrize(
    ("domain", "member"), [("Metro", "a"), ("", "a"), ("m", ""), ("m", "a/b"), ("m", "a" * 64)]
)
def test_malformed_fields_are_named(domain: str, member: str) -> None:
    with pytest.raises(CallerError, match=r"domain|id"):
        Identity(domain, Role.NODE, member)


def test_certificate_of_each_role(pki: Pki) -> None:
    for role in Role:
        assert identity_of(pki.member(role, "x-1").certificate) == Identity("metro", role, "x-1")


@pytest.mark.parametrize(
    ("uris", "hosts"),
    [
        ((), ("localhost",)),
        (("https://example.org/",), ()),
        ((URI, "keymesh://metro/node/kme-b"), ()),
        ((URI, URI), ()),
        ((URI, "KEYMESH://metro/node/kme-b"), ()),
        (("keymesh://metro/node/KME",), ()),
        ((URI,), ("kme-b.node.metro.keymesh.internal",)),
        ((URI,), ("KME-A.node.metro.keymesh.internal",)),
    ],
)
def test_ambiguous_certificates_are_refused(
    authority: Authority, uris: tuple[str, ...], hosts: tuple[str, ...]
) -> None:
    with pytest.raises(NotAuthorizedError) as caught:
        identity_of(issued(authority, uris=uris, hosts=hosts))
    assert caught.value.reason is ErrorReason.CERTIFICATE


def test_other_names_do_not_disturb(authority: Authority) -> None:
    certificate = issued(authority, uris=("https://example.org/", URI), hosts=("host.example",))
    assert identity_of(certificate).id == "kme-a"


def test_reader_refuses_other_domains_strangers_and_the_expired(pki: Pki) -> None:
    reader = PeerReader("metro", DenyList(None))
    good = pki.node("kme-a")
    now_s = good.certificate.not_valid_before_utc.timestamp() + 400
    assert reader.read(auth_context(good), now_s).id == "kme-a"
    expired_s = good.certificate.not_valid_after_utc.timestamp() + 1
    for context, at_s in (
        (auth_context(Pki.create("other").node("kme-a")), now_s),
        ({}, now_s),
        ({"x509_pem_cert": [b"-----BEGIN nonsense"]}, now_s),
        (auth_context(pki.sae("sae-a")), now_s),
        (auth_context(good), expired_s),
    ):
        with pytest.raises(NotAuthorizedError):
            reader.read(context, at_s)


def test_every_method_of_ours_is_in_the_table() -> None:
    methods = {
        f"/{service.full_name}/{method.name}"
        for file in (admin_pb2, border_pb2, keys_pb2, link_pb2, peer_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert methods == {method for method in ADMITTED if method.startswith("/mesh.v1.")}


def test_roles_are_denied_unless_listed() -> None:
    require_admitted("/mesh.v1.KeyDelivery/GetKeys", Role.GATEWAY)
    for method, role in (
        ("/mesh.v1.KeyDelivery/GetKeys", Role.NODE),
        ("/mesh.v1.KeyDelivery/GetKeys", Role.TOOL),
        ("/mesh.v1.Peer/Deposit", Role.HUB),
        ("/mesh.v1.Link/Exchange", Role.GATEWAY),
        ("/mesh.v1.Admin/ResetLink", Role.GATEWAY),
        ("/mesh.v1.New/Method", Role.TOOL),
    ):
        with pytest.raises(NotAuthorizedError):
            require_admitted(method, role)
