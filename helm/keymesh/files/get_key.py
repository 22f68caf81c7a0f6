"""Obtains a key at one end and the same key at the other: what `helm test` runs.

Environment: MASTER and SLAVE as `sae_id url secret-folder`. Standard library only. Says what it saw, never
the key; ends with 0 when both ends have the same bytes.
"""

import hmac
import http.client
import json
import os
import ssl
import sys
import time
from base64 import b64decode
from urllib.parse import urlsplit

DEADLINE_S = 120.0


def ask(folder: str, url: str, body: object) -> tuple[int, bytes]:
    """One POST with the SAE's own certificate; status and answer."""
    context = ssl.create_default_context(cafile=f"{folder}/ca.crt")
    context.load_cert_chain(f"{folder}/tls.crt", f"{folder}/tls.key")
    parts = urlsplit(url)
    connection = http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=15, context=context)
    try:
        connection.request("POST", parts.path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def first_key(folder: str, url: str, body: object) -> dict[str, str]:
    """Ask until there is a key: a network that has just started refuses with 503 at first."""
    until = time.monotonic() + DEADLINE_S
    while True:
        try:
            status, answer = ask(folder, url, body)
            if status == http.HTTPStatus.OK:
                key: dict[str, str] = json.loads(answer)["keys"][0]
                return key
            problem = f"{status} {answer.decode(errors='replace')[:300]}"
            is_final = status != http.HTTPStatus.SERVICE_UNAVAILABLE
        except (OSError, http.client.HTTPException) as error:
            problem, is_final = str(error), False
        if is_final or time.monotonic() > until:
            sys.exit(f"{url}: {problem}")
        print(f"not yet: {problem}", flush=True)  # noqa: T201 - its log is its output
        time.sleep(2)


def main() -> None:
    """Master draws, slave fetches by key_ID, both must agree."""
    master, master_url, master_folder = os.environ["MASTER"].split()
    slave, slave_url, slave_folder = os.environ["SLAVE"].split()
    drawn = first_key(master_folder, f"{master_url}/api/v1/keys/{slave}/enc_keys", {"number": 1})
    print(f"{master} has key {drawn['key_ID']}", flush=True)  # noqa: T201
    wanted = {"key_IDs": [{"key_ID": drawn["key_ID"]}]}
    fetched = first_key(slave_folder, f"{slave_url}/api/v1/keys/{master}/dec_keys", wanted)
    if not hmac.compare_digest(b64decode(drawn["key"]), b64decode(fetched["key"])):
        sys.exit(f"{slave} got other bytes for key {drawn['key_ID']}")
    print(f"{slave} has the same {8 * len(b64decode(fetched['key']))} bits", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
