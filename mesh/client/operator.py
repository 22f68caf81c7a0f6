"""What operators ask a node: status, links, reserves, alarms, as tables or JSON.

Speaks the admin service with a tool certificate. Carries no key facts, because the
service has none to give. Must not change anything at a node but what the operator says in so many
words: acknowledge an alarm, reset a link.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from mesh.core.identity import Identity, Role
from mesh.errors import ConfigError, ErrorReason
from mesh.rpc.status import error_from_rpc
from mesh.v1 import admin_pb2, admin_pb2_grpc

_Row = Sequence[object]


@dataclass(frozen=True, slots=True)
class OperatorTarget:
    """One node, and the tool certificate to ask it with.

    Attributes:
        address: ``host:port`` of its gRPC listener.
        kme_id: its id, which its certificate must show.
        domain_id: its domain.
        role: node or hub.
        ca, cert, key: node root, tool certificate and key, PEM files.
    """

    address: str
    kme_id: str
    domain_id: str
    ca: Path
    cert: Path
    key: Path
    role: Role = Role.NODE


def ask(target: OperatorTarget, what: str, *, timeout_s: float = 5.0) -> Message:
    """Ask a node for ``status``, ``links``, ``reserves`` or ``alarms``.

    Raises:
        ConfigError: a PEM file cannot be read.
        MeshError: the node cannot be reached or refuses.
    """
    with open_channel(target) as channel:
        stub = admin_pb2_grpc.AdminStub(channel)
        calls: dict[str, Callable[[], Message]] = {
            "status": lambda: stub.GetNodeStatus(admin_pb2.NodeStatusRequest(), timeout=timeout_s),
            "links": lambda: stub.ListLinks(admin_pb2.ListLinksRequest(), timeout=timeout_s),
            "reserves": lambda: stub.ListReserves(admin_pb2.ListReservesRequest(), timeout=timeout_s),
            "alarms": lambda: stub.ListAlarms(admin_pb2.ListAlarmsRequest(), timeout=timeout_s),
        }
        try:
            return calls[what]()
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error


def acknowledge(target: OperatorTarget, alarm_id: str, *, timeout_s: float = 5.0) -> None:
    """Clear an alarm that waits for the operator.

    Raises:
        MeshError: no such alarm, or the node cannot be reached.
    """
    with open_channel(target) as channel:
        try:
            admin_pb2_grpc.AdminStub(channel).AcknowledgeAlarm(
                admin_pb2.AcknowledgeAlarmRequest(alarm_id=alarm_id), timeout=timeout_s
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error


def reset_link(target: OperatorTarget, peer: str, *, timeout_s: float = 30.0) -> tuple[int, int]:
    """Throw away all material of a link at this end and begin new epochs of both its lanes.

    Returns:
        The new epochs, outbound and inbound.

    Raises:
        MeshError: the node has no such link, or cannot be reached.
    """
    with open_channel(target) as channel:
        try:
            answer = admin_pb2_grpc.AdminStub(channel).ResetLink(
                admin_pb2.ResetLinkRequest(peer_kme_id=peer, confirm_peer_kme_id=peer), timeout=timeout_s
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
    return answer.transmit_epoch, answer.receive_epoch


def open_channel(target: OperatorTarget) -> grpc.Channel:
    """A channel to a node with the tool's certificate; the node's own is pinned.

    Raises:
        ConfigError: a PEM file cannot be read.
    """
    try:
        ca, cert, key = (path.read_bytes() for path in (target.ca, target.cert, target.key))
    except OSError as error:
        raise ConfigError(
            f"cannot read {error.filename}: {error.strerror}", reason=ErrorReason.CERTIFICATE
        ) from error
    pinned = Identity(target.domain_id, target.role, target.kme_id).dns_name
    return grpc.secure_channel(
        target.address,
        grpc.ssl_channel_credentials(ca, key, cert),
        options=[("grpc.ssl_target_name_override", pinned), ("grpc.enable_http_proxy", 0)],
    )


def as_plain(message: Message) -> dict[str, Any]:
    """An answer as plain values for JSON: every field, bytes as hexadecimal digits."""

    def plain(value: Any) -> Any:
        if isinstance(value, Message):
            return as_plain(value)
        return value.hex() if isinstance(value, bytes) else value

    result = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            result[field.name] = [plain(entry) for entry in value]
        else:
            result[field.name] = plain(value)
    return result


def as_table(answers: Sequence[tuple[str, Message]]) -> str:
    """Answers of the same kind from several nodes as one table; the first column is the node."""
    rows: list[_Row] = []
    header: _Row = ()
    for kme_id, answer in answers:
        header, own = _rows(answer)
        rows += [(kme_id, *row) for row in own]
    return align([("NODE", *header), *rows])


def _rows(answer: Message) -> tuple[_Row, list[_Row]]:
    if isinstance(answer, admin_pb2.NodeStatus):
        return (
            ("ROLE", "VERSION", "UP", "RESTART", "DOCUMENT", "DIRECTORY", "CERTIFICATE ENDS", "ALARMS"),
            [
                (
                    answer.role,
                    answer.software_version,
                    _duration(answer.uptime_s),
                    "proven" if answer.is_proven_restart else "unproven",
                    f"{answer.document_serial}{' (unsigned)' if answer.trusts_directory else ''}",
                    f"{answer.directory_staleness_s:.0f} s old",
                    _day(answer.certificate_expires_at_s),
                    answer.open_alarms,
                )
            ],
        )
    if isinstance(answer, admin_pb2.ListLinksResponse):
        return (
            ("PEER", "STATE", "SEND", "RECEIVE", "INGEST", "DEVICE", "BAD TAGS", "QUARANTINED", "LAST ERROR"),
            [
                (
                    link.peer_kme_id,
                    link.state,
                    _size(link.transmit.usable),
                    _size(link.receive.usable),
                    f"{_size(link.ingest_bytes_per_s)}/s",
                    link.device_state or "-",
                    link.failed_tags,
                    link.quarantined_blocks,
                    link.last_error or "-",
                )
                for link in answer.links
            ],
        )
    if isinstance(answer, admin_pb2.ListReservesResponse):
        return (
            ("PEER", "DIRECTION", "EPOCH", "GRADE", "ASSIGNED", "DRAWN", "HELD", "SEALED", "REDEEMED"),
            [
                (
                    reserve.peer_kme_id,
                    "out" if reserve.is_outbound else "in",
                    reserve.epoch,
                    reserve.grade,
                    reserve.assigned_slots,
                    reserve.drawn_slots,
                    reserve.held_key_slots,
                    reserve.held_sealed_slots,
                    reserve.redeemed_slots,
                )
                for reserve in answer.reserves
            ],
        )
    if isinstance(answer, admin_pb2.ListAlarmsResponse):
        return (
            ("SEVERITY", "SINCE", "TIMES", "ALARM", "WHAT", "NEXT STEP"),
            [
                (
                    alarm.severity + (" (needs operator)" if alarm.needs_operator else ""),
                    datetime.fromtimestamp(alarm.raised_at_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ"),
                    alarm.count,
                    alarm.alarm_id,
                    alarm.message,
                    alarm.next_step,
                )
                for alarm in answer.alarms
            ],
        )
    raise TypeError(type(answer).__name__)


def align(rows: Sequence[_Row]) -> str:
    """Rows of cells as text with aligned columns; the first row is the header."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in texts) for column in range(len(texts[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in texts)
    return "\n".join(line.rstrip() for line in lines)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _duration(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


def _day(at_s: int) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d") if at_s else "-"
