"""Who may ask for what, how much and how fast: access table, limits, quotas, water marks.

Owns the decisions; the caller enforces them before anything is burnt. Deny by default:
an access table without a matching rule refuses, and only labs use ``AccessTable.open``.
Pure: time is an argument (seconds of a monotonic clock) and files are read elsewhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mesh.core.names import check_sae_id
from mesh.errors import CallerError, ConfigError, ErrorReason, NotAuthorizedError, ShortageError

KIB = 1024
MIB = 1024 * KIB
MAX_RULES = 10_000
MAX_BUCKETS = 100_000


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may ask for; sizes in bytes. Defaults are the ETSI 014 front's (contract)."""

    default_key_size_bytes: int = 32
    min_key_size_bytes: int = 1
    max_key_size_bytes: int = 8192
    max_keys_per_request: int = 128
    max_additional_slaves: int = 8
    max_call_bytes: int = 1 * MIB

    def __post_init__(self) -> None:
        if not 1 <= self.min_key_size_bytes <= self.default_key_size_bytes <= self.max_key_size_bytes <= 8192:
            raise ConfigError("limits need 1 <= min <= default <= max key size <= 8192 bytes")
        if min(self.max_keys_per_request, self.max_call_bytes) < 1 or self.max_additional_slaves < 0:
            raise ConfigError("limits must be positive")

    def check(self, number: int, size_bytes: int | None, additional_slaves: int = 0) -> int:
        """Checks a request and returns the key size in bytes (the default for None).

        Raises:
            CallerError: INVALID_ARGUMENT for values that no KME takes, LIMIT_EXCEEDED for ours.
        """
        size = self.default_key_size_bytes if size_bytes is None else size_bytes
        if number < 1:
            raise CallerError("number must be at least 1", facts={"number": number})
        if not self.min_key_size_bytes <= size <= self.max_key_size_bytes:
            raise _exceeded("size", size, self.max_key_size_bytes, at_least=self.min_key_size_bytes)
        if number > self.max_keys_per_request:
            raise _exceeded("number", number, self.max_keys_per_request)
        if additional_slaves > self.max_additional_slaves:
            raise _exceeded("additional_slave_SAE_IDs", additional_slaves, self.max_additional_slaves)
        if (total := number * size) > self.max_call_bytes:
            raise _exceeded("number times size", total, self.max_call_bytes)
        return size


def _exceeded(name: str, value: int, at_most: int, **facts: int) -> CallerError:
    return CallerError(
        f"{name} is outside this node's limits",
        reason=ErrorReason.LIMIT_EXCEEDED,
        facts={"field": name, "value": value, "at_most": at_most, **facts},
    )


@dataclass(frozen=True, slots=True)
class Rate:
    """Bytes per second on average, ``burst_bytes`` at once."""

    bytes_per_s: float
    burst_bytes: int

    def __post_init__(self) -> None:
        if self.bytes_per_s <= 0 or self.burst_bytes < 1:
            raise ConfigError("rate needs bytes_per_s > 0 and burst_bytes >= 1")


@dataclass(frozen=True, slots=True)
class AccessRule:
    """Callers (patterns) may exchange keys with peers (patterns), within bounds.

    A pattern is an SAE ID, or a prefix followed by ``*`` (also where an SAE ID itself ends in
    ``*``: such a rule admits more). None: no bound of this rule's own.
    """

    saes: tuple[str, ...]
    peers: tuple[str, ...]
    max_key_size_bytes: int | None = None
    max_keys_per_request: int | None = None
    rate: Rate | None = None

    def covers(self, caller: str, peer: str) -> bool:
        """Whether the rule speaks about this caller and peer."""
        return _fits(self.saes, caller) and _fits(self.peers, peer)

    def check(self, number: int, size_bytes: int) -> None:
        """Raises CallerError LIMIT_EXCEEDED when the request is beyond the rule's bounds."""
        if self.max_keys_per_request is not None and number > self.max_keys_per_request:
            raise _exceeded("number", number, self.max_keys_per_request)
        if self.max_key_size_bytes is not None and size_bytes > self.max_key_size_bytes:
            raise _exceeded("size", size_bytes, self.max_key_size_bytes)


def _fits(patterns: Sequence[str], sae_id: str) -> bool:
    return any(sae_id.startswith(p[:-1]) if p.endswith("*") else sae_id == p for p in patterns)


def check_registered(saes: Sequence[str] | None, sae_id: str) -> None:
    """Raises NotAuthorizedError unless the gateway that asks speaks for this SAE (protocol 5.2).

    Args:
        saes: patterns of the SAEs registered to it; None: all that are homed at its node.
        sae_id: the SAE that it names as its caller.
    """
    if saes is not None and not _fits(saes, sae_id):
        raise NotAuthorizedError(
            "the calling SAE is not registered to this gateway", facts={"caller": sae_id}
        )


@dataclass(frozen=True, slots=True)
class AccessTable:
    """Rules in order; the first that covers (caller, peer) decides, none means no."""

    rules: tuple[AccessRule, ...] = ()

    @classmethod
    def open(cls) -> AccessTable:
        """Everybody with everybody: for labs."""
        return cls((AccessRule(("*",), ("*",)),))

    @classmethod
    def parse(cls, data: object) -> AccessTable:
        """Reads ``{rules: [{saes: [..], peers: [..], max_key_size_bytes, max_keys_per_request,
        rate: {bytes_per_s, burst_bytes}}]}``.

        Raises:
            ConfigError: names the field and the problem.
        """
        top = _mapping(data, "access table", ("rules",))
        entries = top.get("rules")
        if not isinstance(entries, list) or len(entries) > MAX_RULES:
            raise ConfigError(f"access table: rules must be a list of at most {MAX_RULES}")
        return cls(tuple(_parse_rule(entry, f"rules[{index}]") for index, entry in enumerate(entries)))

    def rule(self, caller: str, peer: str) -> AccessRule:
        """The rule that admits ``caller`` to exchange keys with ``peer``.

        Raises:
            NotAuthorizedError: no rule admits it; says nothing about whether the peer exists.
        """
        for rule in self.rules:
            if rule.covers(caller, peer):
                return rule
        raise NotAuthorizedError("the access table does not admit this pair", facts={"caller": caller})


def _parse_rule(data: object, where: str) -> AccessRule:
    fields = ("saes", "peers", "max_key_size_bytes", "max_keys_per_request", "rate")
    entry = _mapping(data, where, fields)
    rate = None
    if "rate" in entry:
        rate_entry = _mapping(entry["rate"], f"{where}.rate", ("bytes_per_s", "burst_bytes"))
        speed = rate_entry.get("bytes_per_s")
        if isinstance(speed, bool) or not isinstance(speed, int | float) or speed <= 0:
            raise ConfigError(f"access table: {where}.rate.bytes_per_s must be a number above 0")
        burst = _whole(rate_entry, "burst_bytes", f"{where}.rate", default=max(1, int(speed)))
        rate = Rate(float(speed), burst)
    bounds = {name: _whole(entry, name, where) for name in _BOUNDS if name in entry}
    return AccessRule(
        saes=_patterns(entry.get("saes"), f"{where}.saes"),
        peers=_patterns(entry.get("peers"), f"{where}.peers"),
        max_key_size_bytes=bounds.get("max_key_size_bytes"),
        max_keys_per_request=bounds.get("max_keys_per_request"),
        rate=rate,
    )


_BOUNDS = ("max_key_size_bytes", "max_keys_per_request")


def _patterns(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"access table: {where} must be a list of SAE IDs or prefixes ending in *")
    for pattern in value:
        if not isinstance(pattern, str):
            raise ConfigError(f"access table: {where} must hold text")
        if pattern != "*":
            check_sae_id(pattern.removesuffix("*"), f"access table: {where}")
    return tuple(value)


def _whole(entry: Mapping[str, Any], name: str, where: str, *, default: int | None = None) -> int:
    value = entry.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"access table: {where}.{name} must be a whole number above 0")
    return value


def _mapping(value: object, where: str, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"access table: {where} must be a mapping")
    if unknown := [str(name)[:64] for name in value if name not in known]:
        raise ConfigError(f"access table: {where} has the unknown field {unknown[0]!r}")
    return value


@dataclass(slots=True)
class TokenBucket:
    """``burst_bytes`` at once, refilled at ``bytes_per_s``. A clock that jumps back refills nothing."""

    rate: Rate
    level: float = field(init=False)
    at_s: float | None = None

    def __post_init__(self) -> None:
        self.level = float(self.rate.burst_bytes)

    def take(self, nbytes: int, now_s: float) -> None:
        """Takes ``nbytes`` or nothing.

        Raises:
            ShortageError: QUOTA_EXCEEDED, with the seconds after which the same call fits.
            CallerError: LIMIT_EXCEEDED when it can never fit.
        """
        if nbytes > self.rate.burst_bytes:
            raise _exceeded("bytes in one call", nbytes, self.rate.burst_bytes)
        if self.at_s is not None and now_s > self.at_s:
            self.level = min(self.rate.burst_bytes, self.level + (now_s - self.at_s) * self.rate.bytes_per_s)
        self.at_s = now_s
        if nbytes > self.level:
            raise ShortageError(
                "the pair's quota is used up",
                reason=ErrorReason.QUOTA_EXCEEDED,
                retry_after_s=(nbytes - self.level) / self.rate.bytes_per_s,
            )
        self.level -= nbytes


class Quotas:
    """A bucket per (caller, peer), at most ``MAX_BUCKETS``.

    Beyond that the longest unused is dropped, and is full when its pair comes back.
    """

    def __init__(self, max_buckets: int = MAX_BUCKETS) -> None:
        self._max = max_buckets
        self._buckets: OrderedDict[tuple[str, str], TokenBucket] = OrderedDict()

    def take(self, caller: str, peer: str, rate: Rate | None, nbytes: int, now_s: float) -> None:
        """Charges the pair; no rate means no quota. Raises as ``TokenBucket.take``."""
        if rate is None:
            return
        pair = (caller, peer)
        bucket = self._buckets.get(pair)
        if bucket is None or bucket.rate != rate:
            bucket = self._buckets[pair] = TokenBucket(rate)
        self._buckets.move_to_end(pair)
        while len(self._buckets) > self._max:
            self._buckets.popitem(last=False)
        bucket.take(nbytes, now_s)


@dataclass(slots=True)
class WaterMarks:
    """When to refill a reserve: from below low until high is reached (hysteresis); in bytes."""

    high_bytes: int = 4 * MIB
    low_bytes: int = 2 * MIB
    is_refilling: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.low_bytes <= self.high_bytes:
            raise ConfigError("water marks need 0 <= low <= high")

    def wanted(self, level_bytes: int, pending_bytes: int) -> int:
        """Bytes to establish now, given what is there and what is under way; 0 for none."""
        held = level_bytes + pending_bytes
        if held < self.low_bytes or (held == 0 and self.high_bytes > 0):
            self.is_refilling = True
        if held >= self.high_bytes:
            self.is_refilling = False
        return self.high_bytes - held if self.is_refilling else 0
