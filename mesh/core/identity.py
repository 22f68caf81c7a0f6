"""Who a certificate of the node plane speaks for: one URI, one spelling.

Owns the rule that an identity is ``keymesh://<domain>/<role>/<id>`` and nothing
else: one spelling per identity, so that comparing strings compares identities.
Must not read certificates or connections; ``mesh.rpc.identity`` does.
Implements the identity half of ``docs/architecture.md`` (threat model: TLS is the
outer, computational layer).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from mesh.errors import CallerError

_LABEL = "[a-z0-9](?:[a-z0-9-]{0,62})"
_NAME = re.compile(_LABEL, re.ASCII)
SCHEME = "keymesh://"
DNS_SUFFIX = "keymesh.internal"


class Role(StrEnum):
    """What the holder of a certificate of the node root is."""

    NODE = "node"
    HUB = "hub"
    GATEWAY = "gateway"
    TOOL = "tool"


_URI = re.compile(rf"keymesh://({_LABEL})/({'|'.join(Role)})/({_LABEL})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Identity:
    """One party of the node plane.

    Args:
        domain: domain id, ``[a-z0-9]([a-z0-9-]{0,62})``.
        role: what the party is.
        id: its id within domain and role, of the same alphabet.

    Raises:
        CallerError: naming the field that is malformed.
    """

    domain: str
    role: Role
    id: str

    def __post_init__(self) -> None:
        for field, value in (("domain", self.domain), ("id", self.id)):
            if not _NAME.fullmatch(value):
                raise CallerError(
                    f"{field} of an identity must be 1 to 63 of a-z, 0-9 and '-', not starting with '-'",
                    facts={field: value[:80]},
                )

    @property
    def uri(self) -> str:
        """The URI that stands in the certificate's subject alternative names."""
        return f"{SCHEME}{self.domain}/{self.role.value}/{self.id}"

    @property
    def dns_name(self) -> str:
        """The DNS name in the certificate that a client pins instead of a host name."""
        return f"{self.id}.{self.role.value}.{self.domain}.{DNS_SUFFIX}"

    def __str__(self) -> str:
        return self.uri


def parse_identity(uri: str) -> Identity:
    """Reads an identity from its URI; accepts exactly what ``Identity.uri`` writes.

    Raises:
        CallerError: for any other spelling (upper case, port, user, query, escapes).
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise CallerError(
            "identity must be keymesh://<domain>/<node|hub|gateway|tool>/<id> in lower case",
            facts={"uri": uri[:200]},
        )
    return Identity(match[1], Role(match[2]), match[3])
