"""The tables a change works on: small typed methods over SQL, one noun per file.

A change is a function of ``Tables``, run by ``Store.commit``; it must not keep the
tables, await, or touch anything that a rolled-back change would have to undo.
"""

from __future__ import annotations

import apsw

from mesh.store.tables.appends import AppendKind, AppendRow, Appends
from mesh.store.tables.base import MovedMarks
from mesh.store.tables.blocks import BlockRow, Blocks, BlockState
from mesh.store.tables.border import (
    Border,
    BorderKeyRow,
    BufferRow,
    CallRow,
    CarryRow,
    ExchangeRow,
    PostRow,
    ReportRow,
)
from mesh.store.tables.extents import ExtentRow, Extents, ExtentState
from mesh.store.tables.jobs import JobRow, Jobs
from mesh.store.tables.keystore import KeyState, Keystore, StoredKeyRow
from mesh.store.tables.lanes import LaneRow, Lanes
from mesh.store.tables.meta import Incarnations, Meta, PeerRow, Peers
from mesh.store.tables.reserves import ReserveRow, Reserves, ReserveState
from mesh.store.tables.slots import Slots, WrongTags

__all__ = [
    "AppendKind",
    "AppendRow",
    "BlockRow",
    "BlockState",
    "BorderKeyRow",
    "BufferRow",
    "CallRow",
    "CarryRow",
    "ExchangeRow",
    "ExtentRow",
    "ExtentState",
    "JobRow",
    "KeyState",
    "LaneRow",
    "PeerRow",
    "PostRow",
    "ReportRow",
    "ReserveRow",
    "ReserveState",
    "StoredKeyRow",
    "Tables",
]


class Tables:
    """All tables of one store, on its one connection."""

    def __init__(self, database: apsw.Connection) -> None:
        self.moved = MovedMarks()
        self.meta = Meta(database, self.moved)
        self.incarnations = Incarnations(database, self.moved)
        self.peers = Peers(database, self.moved)
        self.lanes = Lanes(database, self.moved)
        self.blocks = Blocks(database, self.moved)
        self.extents = Extents(database, self.moved)
        self.reserves = Reserves(database, self.moved)
        self.appends = Appends(database, self.moved)
        self.slots = Slots(database, self.moved)
        self.wrong_tags = WrongTags(database, self.moved)
        self.keystore = Keystore(database, self.moved)
        self.jobs = Jobs(database, self.moved)
        self.border = Border(database, self.moved)
