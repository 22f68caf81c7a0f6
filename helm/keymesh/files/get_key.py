"""Obtains a key at one end and the same key at the other: what `helm test` runs.

Environment: MASTER and SLAVE as `sae_id url secret-folder`, PEER names from them. Standard library
only. Says what it saw, never the key; ends with 0 when both ends have the same bytes.
"""

import hmac
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from base64 import b64decode

DEADLINE_S = 120.0


def ask(folder: str, url: str, body: object = None) -> dict:
    """One call with the SAE's own certificate; the parsed answer."""
    context = ssl.create_default_context(cafile=f"{folder}/ca.crt")
    context.load_cert_chain(f"{folder}/tls.crt", f"{folder}/tls.key")
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=15, context=context) as answer:
        return json.load(answer)


def first_key(folder: str, url: str, body: object) -> dict:
    """Ask until there is a key: a network that has just started refuses with 503 at first."""
    until = time.monotonic() + DEADLINE_S
    while True:
        try:
            return ask(folder, url, body)["keys"][0]
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {error.read().decode(errors='replace')[:300]}"
            if error.code != 503 or time.monotonic() > until:
                sys.exit(f"{url}: {problem}")
        except OSError as error:
            problem = str(error)
            if time.monotonic() > until:
                sys.exit(f"{url}: {problem}")
        print(f"not yet: {problem}", flush=True)
        time.sleep(2)


def main() -> None:
    """Master draws, slave fetches by key_ID, both must agree."""
    master, master_url, master_folder = os.environ["MASTER"].split()
    slave, slave_url, slave_folder = os.environ["SLAVE"].split()
    drawn = first_key(master_folder, f"{master_url}/api/v1/keys/{slave}/enc_keys", {"number": 1})
    print(f"{master} has key {drawn['key_ID']}", flush=True)
    wanted = {"key_IDs": [{"key_ID": drawn["key_ID"]}]}
    fetched = first_key(slave_folder, f"{slave_url}/api/v1/keys/{master}/dec_keys", wanted)
    if not hmac.compare_digest(b64decode(drawn["key"]), b64decode(fetched["key"])):
        sys.exit(f"{slave} got other bytes for key {drawn['key_ID']}")
    print(f"{slave} has the same {8 * len(b64decode(fetched['key']))} bits", flush=True)


if __name__ == "__main__":
    main()
