"""Plays cert-manager where there is none: Kubernetes Secrets for the Certificates of a rendered chart.

For labs and trials. Roots stay in a directory, by the name of their issuer, and are used again by the
next call; their keys never enter a Secret.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mesh.errors import ConfigError
from mesh.pki.authority import Authority, CredentialFiles, write_file

_GROUP = "cert-manager.io/"


def issue_secrets(manifests: str, directory: Path) -> Iterator[dict[str, Any]]:
    """Issues what the Certificates among ``manifests`` ask for.

    Args:
        manifests: YAML documents, as ``helm template`` writes them.
        directory: holds the roots; made if missing.

    Yields:
        A Secret for each Certificate: of a root ``ca.crt``, of others ``ca.crt``, ``tls.crt``, ``tls.key``.

    Raises:
        ConfigError: not YAML, no Certificates, or one lacks what the chart always writes.
    """
    try:
        objects = [one for one in yaml.safe_load_all(manifests) if isinstance(one, dict)]
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}") from error
    ours = [one for one in objects if str(one.get("apiVersion", "")).startswith(_GROUP)]
    wanted = [one for one in ours if one.get("kind") == "Certificate"]
    if not wanted:
        raise ConfigError("no Certificates; render the chart with certificates.source certManager")
    try:
        issuers = {
            one["metadata"]["name"]: one["spec"].get("ca", {}).get("secretName")
            for one in ours
            if one["kind"] == "Issuer"
        }
        directory.mkdir(parents=True, exist_ok=True)
        for one in wanted:
            yield _secret(one["spec"], issuers, directory)
    except KeyError as error:
        raise ConfigError(f"a Certificate or Issuer lacks {error}") from error


def _secret(spec: Mapping[str, Any], issuers: Mapping[str, str | None], directory: Path) -> dict[str, Any]:
    name = spec["secretName"]
    if spec.get("isCA"):
        return _object(name, {"ca.crt": _root(directory, name, spec["commonName"]).pem})
    issuer = spec["issuerRef"]["name"]
    root = _root(directory, issuers.get(issuer) or issuer, f"{issuer} root")
    made = root.issue(
        spec["commonName"],
        kind="lab",
        uris=spec.get("uris", ()),
        hosts=[*spec.get("dnsNames", ()), *spec.get("ipAddresses", ())],
        is_server="server auth" in spec["usages"],
        is_client="client auth" in spec["usages"],
    )
    return _object(name, {"ca.crt": root.pem, "tls.crt": made.cert_pem, "tls.key": made.key_pem})


def _root(directory: Path, name: str, common_name: str) -> Authority:
    files = CredentialFiles(directory / f"{name}.pem", directory / f"{name}.key")
    if files.cert.exists():
        return Authority.load(files)
    root = Authority.create(common_name[:64])
    root.save(directory, name)
    return root


def _object(name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name},
        "type": "kubernetes.io/tls" if "tls.key" in files else "Opaque",
        "data": {key: base64.b64encode(data).decode() for key, data in files.items()},
    }


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read it: {error}", facts={"file": path}) from error


def write_secrets(manifests: str, directory: Path, out: Path) -> int:
    """Writes them as YAML (mode 0600), for ``kubectl apply``.

    Returns:
        How many.

    Raises:
        ConfigError: as ``issue_secrets``.
    """
    secrets = list(issue_secrets(manifests, directory))
    write_file(out, yaml.safe_dump_all(secrets).encode(), mode=0o600)
    return len(secrets)
