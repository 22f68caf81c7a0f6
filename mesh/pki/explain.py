"""``keymesh pki explain``: a certificate in words, and all that is wrong with it.

Owns the purposes that people name on the command line, and the report. What is
checked and how it is worded stands in ``mesh.ops.diagnosis``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from mesh.core.identity import Role
from mesh.errors import ConfigError
from mesh.ops.diagnosis import Diagnosis, Expectation, diagnose

PURPOSES: Mapping[str, Expectation] = {
    "node": Expectation(is_server=True, is_client=True, roles=frozenset({Role.NODE})),
    "hub": Expectation(is_server=True, is_client=True, roles=frozenset({Role.HUB})),
    "gateway": Expectation(is_client=True, roles=frozenset({Role.GATEWAY})),
    "tool": Expectation(is_client=True, roles=frozenset({Role.TOOL})),
    "rest-server": Expectation(is_server=True),
    "sae": Expectation(is_client=True),
    "border": Expectation(is_server=True, is_client=True),
    "device": Expectation(is_server=True),
    "etcd": Expectation(is_server=True, is_client=True),
}


def explain(
    cert: Path,
    *,
    key: Path | None = None,
    ca: Path | None = None,
    purpose: str | None = None,
    hosts: Sequence[str] = (),
    now: datetime | None = None,
) -> Diagnosis:
    """Diagnoses a certificate for a named purpose.

    Args:
        cert: PEM file.
        key: its private key.
        ca: roots that its other ends trust.
        purpose: a name of ``PURPOSES``; None checks what holds for all.
        hosts: DNS names or addresses that it must be valid for.
        now: timezone-aware.

    Raises:
        ConfigError: unknown purpose.
    """
    if purpose is not None and purpose not in PURPOSES:
        raise ConfigError(f"purpose must be one of {', '.join(PURPOSES)}", facts={"purpose": purpose})
    expected = PURPOSES[purpose] if purpose is not None else Expectation()
    return diagnose(cert, key=key, ca=ca, expected=replace(expected, hosts=tuple(hosts)), now=now)


def report(cert: Path, diagnosis: Diagnosis) -> str:
    """The diagnosis as text for a terminal: what it is, then what is wrong, then a verdict."""
    lines = [str(cert)]
    lines += [f"  {name + ':':<9} {value}" for name, value in diagnosis.summary.items()]
    for finding in diagnosis.findings:
        mark = "WRONG" if finding.is_fatal else "note"
        lines.append(f"  {mark}: {finding.words} [{finding.problem.value}]")
    if not diagnosis.findings:
        lines.append("  nothing wrong found")
    return "\n".join(lines) + "\n"
