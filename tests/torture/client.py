"""An SAE of the lab over plain ETSI GS QKD 014, with what an audit must tell apart.

Uses the standard library only. A request that never left (no connection) is not one whose
answer was cut: only the second may have happened (docs: the words lost and indeterminate).
"""

from __future__ import annotations

import base64
import binascii
import http.client
import json
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

IDLE_S = 30.0
"""A connection unused for longer is made anew: a gateway closes it after 75 s, under the next request."""


class NotSentError(Exception):
    """No connection: the request reached nobody."""


class CutError(Exception):
    """The request left, and no whole answer came: it may have happened."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key as delivered; the repr shows no bytes."""

    key_id: str
    value: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer.

    Attributes:
        status: of HTTP.
        headers: names in lower case.
        body: decoded JSON, None for an empty body.
        took_s: seconds from the request to the end of the answer.
    """

    status: int
    headers: Mapping[str, str]
    body: Any = field(repr=False)
    took_s: float

    @property
    def keys(self) -> list[Key]:
        """The keys of a 200.

        Raises:
            ValueError: it is no key container.
        """
        try:
            return [
                Key(entry["key_ID"], base64.b64decode(entry["key"], validate=True))
                for entry in self.body["keys"]
            ]
        except (KeyError, TypeError, binascii.Error) as error:
            raise ValueError(f"not a key container: {type(error).__name__}") from error

    @property
    def reason(self) -> str:
        """The reason that an error answer gives, "" if it gives none."""
        return self._detail("reason")

    @property
    def outcome(self) -> str:
        """Whether a 503 says that nothing happened ("none") or that it may have ("unknown")."""
        return self._detail("outcome")

    def _detail(self, name: str) -> str:
        details = self.body.get("details", ()) if isinstance(self.body, dict) else ()
        return next((str(entry[name]) for entry in details if name in entry), "")


class Sae:
    """One SAE at its own gateway, over one keep-alive connection; not for several threads.

    Args:
        lab: the content of ``lab.json``.
        sae_id: whose certificate to present.
        timeout_s: of one request.
    """

    def __init__(self, lab: Mapping[str, Any], sae_id: str, *, timeout_s: float = 20.0) -> None:
        entry = next(sae for sae in lab["saes"] if sae["id"] == sae_id)
        gateway = next(one for one in lab["gateways"] if one["id"] == entry["gateway"])
        parts = urlsplit(gateway["url"])
        context = ssl.create_default_context(cafile=lab["ca"]["gateway"])
        context.load_cert_chain(entry["cert"], entry["key"])
        self.sae_id = sae_id
        self.node: str = entry["node"]
        self._used_at_s = time.monotonic()
        self._connection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=timeout_s, context=context
        )

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def enc_keys(
        self, slave: str, *, number: int = 1, size_bits: int | None = None, more: Sequence[str] = ()
    ) -> Answer:
        """Get key (clause 5.2), by POST."""
        body: dict[str, Any] = {"number": number}
        if size_bits is not None:
            body["size"] = size_bits
        if more:
            body["additional_slave_SAE_IDs"] = list(more)
        return self._ask("POST", slave, "enc_keys", body)

    def dec_keys(self, master: str, key_ids: Sequence[str]) -> Answer:
        """Get key with key IDs (clause 5.3), by POST."""
        return self._ask("POST", master, "dec_keys", {"key_IDs": [{"key_ID": one} for one in key_ids]})

    def status(self, slave: str) -> Answer:
        """Get status (clause 5.1)."""
        return self._ask("GET", slave, "status", None)

    def _ask(self, verb: str, other: str, method: str, body: object) -> Answer:
        began_s = time.monotonic()
        connection = self._connection
        if began_s - self._used_at_s > IDLE_S:
            connection.close()
        try:
            if connection.sock is None:
                connection.connect()
        except OSError as error:
            connection.close()
            raise NotSentError(str(error)) from error
        try:
            connection.request(
                verb,
                f"/api/v1/keys/{other}/{method}",
                body=None if body is None else json.dumps(body),
                headers={} if body is None else {"Content-Type": "application/json"},
            )
            response = connection.getresponse()
            payload = response.read()
            self._used_at_s = time.monotonic()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise CutError(type(error).__name__) from error
        headers = {name.lower(): value for name, value in response.getheaders()}
        document = json.loads(payload) if payload else None
        return Answer(response.status, headers, document, time.monotonic() - began_s)
