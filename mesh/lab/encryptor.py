"""An encryptor, as the standard knows it: a plain HTTP client with a client certificate.

Uses nothing of the mesh but its REST interface (ETSI GS QKD 014 V1.1.1 clauses 5 and 6),
over one keep-alive connection, with the standard library only. Keys it holds are for
comparing; it must not print them.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit


@dataclass(frozen=True, slots=True)
class FetchedKey:
    """A key as delivered; the repr shows no bytes."""

    key_id: str
    value: bytes = field(repr=False)


class RefusedError(Exception):
    """The gateway answered with another status than 200.

    Args:
        status: the HTTP status.
        body: the answer's body.
    """

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"HTTP {status}: {body[:300].decode(errors='replace')}")
        self.status = status
        self.body = body


class Encryptor:
    """One SAE at its gateway.

    Args:
        url: the gateway's base URL, without ``/api/v1``.
        ca: PEM file that verifies the gateway's certificate (strict X.509).
        cert: the SAE's certificate, PEM file.
        key: its key, PEM file.
        timeout_s: of one request.

    Attributes:
        request_id: by which the gateway knows the last request; empty before the first answer.
    """

    def __init__(self, url: str, *, ca: str, cert: str, key: str, timeout_s: float = 15.0) -> None:
        parts = urlsplit(url)
        context = ssl.create_default_context(cafile=ca)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_cert_chain(cert, key)
        self._connection = http.client.HTTPSConnection(
            parts.hostname or "localhost", parts.port or 443, timeout=timeout_s, context=context
        )
        self.request_id = ""

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Encryptor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def status(self, slave: str) -> Mapping[str, Any]:
        """Get status towards the SAE ``slave`` (clause 5.1)."""
        return self._ask("GET", slave, "status")

    def enc_keys(
        self, slave: str, *, number: int | None = None, size_bits: int | None = None
    ) -> list[FetchedKey]:
        """Get key (clause 5.2): fresh keys to share with ``slave``."""
        asked = {"number": number, "size": size_bits}
        query = "&".join(f"{name}={value}" for name, value in asked.items() if value is not None)
        return _keys(self._ask("GET", slave, f"enc_keys?{query}" if query else "enc_keys"))

    def container(self, slave: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Get key by POST (clause 5.2): the whole key container, extensions and keys included."""
        return self._ask("POST", slave, "enc_keys", json.dumps(request).encode())

    def dec_keys(self, master: str, key_ids: Sequence[str]) -> list[FetchedKey]:
        """Get key with key IDs (clause 5.3): the keys that ``master`` got, once."""
        if len(key_ids) == 1:
            return _keys(self._ask("GET", master, f"dec_keys?key_ID={quote(key_ids[0])}"))
        body = json.dumps({"key_IDs": [{"key_ID": key_id} for key_id in key_ids]}).encode()
        return _keys(self._ask("POST", master, "dec_keys", body))

    def _ask(self, verb: str, other: str, method: str, body: bytes | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        path = f"/api/v1/keys/{quote(other, safe='')}/{method}"
        try:
            self._connection.request(verb, path, body=body, headers=headers)
            response = self._connection.getresponse()
            payload = response.read()
            self.request_id = response.getheader("X-Request-Id", "")
        except (http.client.HTTPException, OSError):
            self._connection.close()
            raise
        if response.status != 200:
            raise RefusedError(response.status, payload)
        answer = json.loads(payload)
        if not isinstance(answer, dict):
            raise RefusedError(response.status, b"the answer is not an object")
        return answer


def _keys(container: Mapping[str, Any]) -> list[FetchedKey]:
    return [
        FetchedKey(entry["key_ID"], base64.b64decode(entry["key"], validate=True))
        for entry in container["keys"]
    ]
