"""From certificates to SAE IDs: order, table, ambiguity, refusal."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gateway.identity import (
    MappingSettings,
    NameSource,
    SaeMapper,
    TableEntry,
    is_sae_id,
    load_mapper,
    read_certificate,
)
from mesh.client import ConfigError, NotAuthorizedError

KEY = ec.generate_private_key(ec.SECP256R1())
NOW = datetime.now(UTC)


def certificate(
    *, cn: tuple[str, ...] = (), uris: tuple[str, ...] = (), dns: tuple[str, ...] = (), serial: int = 77
) -> bytes:
    """A self-signed certificate with these names, DER."""
    subject = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example")]
        + [x509.NameAttribute(NameOID.COMMON_NAME, name) for name in cn]
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")]))
        .public_key(KEY.public_key())
        .serial_number(serial)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=1))
    )
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    names += [x509.DNSName(name) for name in dns]
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def identify(der: bytes, **settings: object) -> str:
    mapper = SaeMapper(MappingSettings(**settings), domain_id="metro")  # type: ignore[arg-type]
    return mapper.identify(read_certificate(der)).sae_id


def refused(der: bytes, **settings: object) -> str:
    with pytest.raises(NotAuthorizedError) as caught:
        identify(der, **settings)
    return caught.value.message


def test_uri_comes_before_dns_before_cn() -> None:
    everything = certificate(cn=("cn-id",), uris=("urn:sae:7",), dns=("dns-id",))
    assert identify(everything) == "urn:sae:7"
    assert identify(certificate(cn=("cn-id",), dns=("dns-id",))) == "dns-id"
    assert identify(certificate(cn=("cn-id",))) == "cn-id"


def test_the_order_and_the_sources_are_configurable() -> None:
    everything = certificate(cn=("cn-id",), uris=("urn:sae:7",), dns=("dns-id",))
    assert identify(everything, sources=(NameSource.CN, NameSource.URI_SAN)) == "cn-id"
    assert identify(everything, sources=(NameSource.DNS_SAN,)) == "dns-id"
    refused(certificate(cn=("cn-id",)), sources=(NameSource.URI_SAN,))


def test_the_domains_uri_prefix_stands_for_the_decoded_rest() -> None:
    assert identify(certificate(uris=("sae://metro/enc-a",))) == "enc-a"
    assert identify(certificate(uris=("sae://metro/a%2Fb",))) == "a/b"
    assert identify(certificate(uris=("sae://other/enc-a",))) == "sae://other/enc-a"
    assert identify(certificate(uris=("urn:corp:sae:1",)), uri_prefixes=("urn:corp:sae:",)) == "1"
    refused(certificate(uris=("sae://metro/",)))
    refused(certificate(uris=("sae://metro/%zz",)))
    refused(certificate(uris=("sae://metro/%FF",)))
    refused(certificate(uris=("sae://metro/%20",)))


def test_two_names_in_the_deciding_source_are_ambiguous() -> None:
    assert "more than one" in refused(certificate(uris=("urn:a", "urn:b"), cn=("c",)))
    assert "more than one" in refused(certificate(dns=("a", "b")))
    assert "more than one" in refused(certificate(cn=("a", "b")))
    assert identify(certificate(cn=("a", "a"))) == "a"


def test_a_bad_name_is_refused_and_never_falls_through_to_the_next_source() -> None:
    for der in (
        certificate(uris=("urn:" + "x" * 61,), cn=("good",)),
        certificate(dns=("*.example",), cn=("good",)),
        certificate(cn=("two words",)),
        certificate(cn=("Ünïcode",)),
        certificate(cn=("x" * 64,), uris=("urn:%",)),
    ):
        refused(der)


def test_certificates_of_the_node_plane_are_never_saes() -> None:
    for uri in ("keymesh://metro/node/kme-a", "KEYMESH://metro/gateway/g"):
        message = refused(
            certificate(uris=(uri,), cn=("sae",)),
            sources=(NameSource.CN,),
            table=[TableEntry(sae_id="sae", serial=77)],
        )
        assert "node plane" in message


def test_no_name_no_sae() -> None:
    assert "no SAE ID" in refused(certificate())


def test_the_table_wins_over_names() -> None:
    der = certificate(cn=("cn-id",), serial=0x1F2E)
    fingerprint = read_certificate(der).fingerprint.hex(":")
    for row in (
        TableEntry(sae_id="table-id", fingerprint=fingerprint.upper()),
        TableEntry(sae_id="table-id", fingerprint=fingerprint.replace(":", "")),
        TableEntry(sae_id="table-id", serial=0x1F2E),
        TableEntry(sae_id="table-id", serial="1F:2E"),
        TableEntry(sae_id="table-id", serial="0x1f2e", issuer="CN=root"),
        TableEntry(sae_id="table-id", subject="CN=cn-id,O=Example"),
    ):
        assert identify(der, table=[row]) == "table-id"
    for row in (
        TableEntry(sae_id="table-id", serial=1),
        TableEntry(sae_id="table-id", serial=0x1F2E, issuer="CN=other"),
        TableEntry(sae_id="table-id", subject="CN=cn-id"),
        TableEntry(sae_id="table-id", fingerprint="00" * 32),
    ):
        assert identify(der, table=[row]) == "cn-id"


def test_rows_that_disagree_are_ambiguous() -> None:
    rows = [TableEntry(sae_id="one", serial=77), TableEntry(sae_id="two", subject="CN=a,O=Example")]
    assert "more than one" in refused(certificate(cn=("a",)), table=rows)
    same = [TableEntry(sae_id="one", serial=77), TableEntry(sae_id="one", subject="CN=a,O=Example")]
    assert identify(certificate(cn=("a",)), table=same) == "one"


@pytest.mark.parametrize(
    ("row", "at"),
    [
        (TableEntry(sae_id="a b", serial=1), "sae_mapping.table[0].sae_id"),
        (TableEntry(sae_id="a"), "sae_mapping.table[0]"),
        (TableEntry(sae_id="a", issuer="CN=x"), "sae_mapping.table[0]"),
        (TableEntry(sae_id="a", fingerprint="abc"), "sae_mapping.table[0].fingerprint"),
        (TableEntry(sae_id="a", fingerprint="zz" * 32), "sae_mapping.table[0].fingerprint"),
        (TableEntry(sae_id="a", serial="xyz"), "sae_mapping.table[0].serial"),
        (TableEntry(sae_id="a", subject="no name"), "sae_mapping.table[0].subject"),
    ],
)
def test_bad_rows_are_refused_with_their_place(row: TableEntry, at: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SaeMapper(MappingSettings(table=[row]), domain_id="metro")
    assert caught.value.facts["at"] == at


def test_settings_that_could_admit_nobody_or_repeat_a_source_are_refused() -> None:
    with pytest.raises(ConfigError, match="no SAE could ever call"):
        SaeMapper(MappingSettings(sources=()), domain_id="metro")
    with pytest.raises(ConfigError, match="twice"):
        SaeMapper(MappingSettings(sources=(NameSource.CN, NameSource.CN)), domain_id="metro")


def test_the_table_file_is_read_and_checked(tmp_path: Path) -> None:
    table = tmp_path / "table.yaml"
    settings = MappingSettings(table_file="table.yaml")
    table.write_text("version: 1\nentries:\n- {sae_id: from-file, serial: 77}\n")
    mapper = load_mapper(settings, domain_id="metro", base=tmp_path)
    assert mapper.identify(read_certificate(certificate())).sae_id == "from-file"
    for text, message in (
        ("version: 2\n", "version"),
        ("entries: []\n", "version"),
        ("version: 1\nentries:\n- {sae_id: x, serail: 1}\n", "serail"),
        ("version: 1\nentries: {}\n", "entries"),
        ("a: [\n", "not valid YAML"),
    ):
        table.write_text(text)
        with pytest.raises(ConfigError, match=message) as caught:
            load_mapper(settings, domain_id="metro", base=tmp_path)
        assert caught.value.facts["file"] == str(table)
    table.unlink()
    with pytest.raises(ConfigError, match="cannot read the file"):
        load_mapper(settings, domain_id="metro", base=tmp_path)


def test_unreadable_certificates_are_refused() -> None:
    with pytest.raises(NotAuthorizedError):
        read_certificate(b"\x30\x03\x02\x01\x01")


@pytest.mark.parametrize("text", ["a", "x" * 64, "urn:a/b?c#d[e]@!$&'()*+,;=", "%41", "~._-"])
def test_legal_sae_ids(text: str) -> None:
    assert is_sae_id(text)


@pytest.mark.parametrize(
    "text", ["", "x" * 65, "a b", "a\n", "\n", "%", "%4", "é", 'a"', "<", "a\\b", "{a}", "\x00"]
)
def test_illegal_sae_ids(text: str) -> None:
    assert not is_sae_id(text)
