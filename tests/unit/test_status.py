"""Every reason travels, and comes back as the family that tells the caller what to do."""

from __future__ import annotations

import grpc
import pytest

from mesh.errors import (
    CallerError,
    ErrorReason,
    IntegrityError,
    MeshError,
    NotAuthorizedError,
    PeerError,
    ShortageError,
    UnavailableError,
)
from mesh.rpc import status
from mesh.v1 import keys_pb2


def rpc_error(code: grpc.StatusCode, details: str, *metadata: tuple[str, str]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details=details)


@pytest.mark.parametrize("reason", list(ErrorReason))
def test_every_reason_survives_the_round_trip(reason: ErrorReason) -> None:
    error = status.make_error(reason, "it is so", retry_after_s=1.5)
    back = status.error_from_rpc(
        rpc_error(status.status_of(reason), error.message, *status.trailing_metadata(error))
    )
    assert (type(back), back.reason, back.message, back.retry_after_s) == (
        status.FAMILY[reason],
        reason,
        "it is so",
        1.5,
    )
    decoded = status.error_from_failure(status.failure_from(error))
    assert (type(decoded), decoded.reason, decoded.retry_after_s) == (type(back), reason, 1.5)


def test_tables_are_complete() -> None:
    assert set(status.STATUS) == set(status.FAMILY) == set(ErrorReason)
    assert grpc.StatusCode.OK not in status.STATUS.values()


@pytest.mark.parametrize(
    ("code", "family", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnavailableError, ErrorReason.PEER_UNREACHABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, UnavailableError, ErrorReason.DEADLINE_EXCEEDED),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ShortageError, ErrorReason.BUSY),
        (grpc.StatusCode.PERMISSION_DENIED, NotAuthorizedError, ErrorReason.NOT_AUTHORIZED),
        (grpc.StatusCode.INVALID_ARGUMENT, CallerError, ErrorReason.INVALID_ARGUMENT),
        (grpc.StatusCode.UNIMPLEMENTED, PeerError, ErrorReason.PROTOCOL_VIOLATION),
        (grpc.StatusCode.INTERNAL, UnavailableError, ErrorReason.PEER_UNREACHABLE),
        (grpc.StatusCode.UNKNOWN, UnavailableError, ErrorReason.INTERNAL),
        (grpc.StatusCode.ABORTED, UnavailableError, ErrorReason.INTERNAL),
    ],
)
def test_failures_without_a_reason_of_ours(
    code: grpc.StatusCode, family: type[MeshError], reason: ErrorReason
) -> None:
    error = status.error_from_rpc(rpc_error(code, ""))
    assert (type(error), error.reason) == (family, reason)
    assert error.message


def test_the_reason_decides_not_the_status() -> None:
    metadata = (status.REASON_KEY, "tag-mismatch")
    assert isinstance(
        status.error_from_rpc(rpc_error(grpc.StatusCode.UNKNOWN, "x", metadata)), IntegrityError
    )


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "x", "", "1e99"])
def test_nonsense_from_the_other_end_is_harmless(text: str) -> None:
    error = status.error_from_rpc(
        rpc_error(
            grpc.StatusCode.UNAVAILABLE,
            "x" * 9999,
            (status.REASON_KEY, "no-such-reason"),
            (status.RETRY_AFTER_KEY, text),
        )
    )
    assert error.reason is ErrorReason.PEER_UNREACHABLE
    assert error.retry_after_s == 0.0
    assert len(error.message) <= 1024
    assert status.error_from_failure(keys_pb2.Failure(reason="?")).reason is ErrorReason.INTERNAL


def test_an_error_that_is_no_call() -> None:
    assert status.error_from_rpc(grpc.RpcError()).reason is ErrorReason.INTERNAL


def test_handshake_failures_read_as_words() -> None:
    details = "connections failed; last error: Ssl handshake failed: CERTIFICATE_VERIFY_FAILED"
    error = status.error_from_rpc(rpc_error(grpc.StatusCode.UNAVAILABLE, details))
    assert "certificate was not accepted" in error.message
    details = "Hostname Verification Check failed."
    assert (
        "belongs to someone else"
        in status.error_from_rpc(rpc_error(grpc.StatusCode.UNAVAILABLE, details)).message
    )


def test_failures_are_bounded() -> None:
    facts = {f"f{index}": "v" * 1000 for index in range(100)}
    failure = status.failure_from(CallerError("m" * 5000, facts=facts))
    assert len(failure.message) == 1024
    assert len(failure.details) == 16
    assert max(len(value) for value in failure.details.values()) == 200
