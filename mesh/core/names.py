"""Identifiers: what a KME, hub, domain or SAE may be called, and how links are.

Owns the syntax; who exists is the network document's. KME, hub and domain ids are
DNS labels, because they become certificate names. SAE ids are 1 to 64 characters
legal in an RFC 3986 URI (ETSI GS QKD 020 on SAE ids; 014 puts them URL-encoded
into the path).
"""

from __future__ import annotations

import re
from typing import NoReturn

from mesh.errors import CallerError

_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62})")
# unreserved, gen-delims and sub-delims of RFC 3986 section 2, or a percent-encoded octet
_SAE = re.compile(r"(?:[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=]|%[0-9A-Fa-f]{2})+")
_SAE_MAX_CHARS = 64
_SHOWN_CHARS = 80


def check_kme_id(value: str, field: str = "kme_id") -> str:
    """Return ``value`` if it is a KME or hub id: 1-63 of a-z, 0-9 and -, no leading -.

    Raises:
        CallerError: it is not; names ``field``.
    """
    return _check_label(value, field)


def check_domain_id(value: str, field: str = "domain_id") -> str:
    """Return ``value`` if it is a domain id; the syntax is that of KME ids.

    Raises:
        CallerError: it is not; names ``field``.
    """
    return _check_label(value, field)


def check_sae_id(value: str, field: str = "sae_id") -> str:
    """Return ``value`` if it is an SAE id: 1-64 characters legal in an RFC 3986 URI.

    Raises:
        CallerError: it is not; names ``field``.
    """
    if not isinstance(value, str) or len(value) > _SAE_MAX_CHARS or not _SAE.fullmatch(value):
        _refuse(value, field, "1 to 64 characters legal in a uri (rfc 3986)")
    return value


def smaller(a: str, b: str) -> str:
    """The smaller of two KME ids: the end that dials (protocol 1.8).

    Raises:
        ValueError: they are the same.
    """
    if a == b:
        raise ValueError("a link needs two different ends")
    return min(a, b)


def link_id(a: str, b: str) -> str:
    """The one name of the link between two KMEs, whichever end asks: ``kme-a--kme-b``.

    Unique although ids may contain ``--``: it names links to people and to files
    of one node, whose own id is one of the two, and is never parsed.

    Raises:
        ValueError: they are the same.
    """
    first = smaller(a, b)
    return f"{first}--{b if first == a else a}"


def _check_label(value: str, field: str) -> str:
    if not isinstance(value, str) or not _LABEL.fullmatch(value):
        _refuse(value, field, "1 to 63 characters of a-z, 0-9 and '-', starting with a letter or digit")
    return value


def _refuse(value: object, field: str, expected: str) -> NoReturn:
    raise CallerError(
        f"{field} must be {expected}", facts={"field": field, "value": repr(value)[:_SHOWN_CHARS]}
    )
