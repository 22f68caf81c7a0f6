"""The database schema and its migrations; ``docs/formats.md`` is its description.

``user_version`` is the number of migrations applied. A migration is never edited
once released: add one. All tables are STRICT; times are seconds since 1970, sizes
and offsets bytes, slots counts of 48-byte slots.
"""

from __future__ import annotations

APPLICATION_ID = 0x4B4D5348  # "KMSH"

_VERSION_1 = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE serials (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE incarnations (number INTEGER PRIMARY KEY AUTOINCREMENT, id BLOB NOT NULL UNIQUE) STRICT;
CREATE TABLE peers (
    peer TEXT PRIMARY KEY, incarnation BLOB, is_proven INTEGER NOT NULL,
    document_serial INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE lanes (
    lane_id INTEGER PRIMARY KEY AUTOINCREMENT, peer TEXT NOT NULL, is_outbound INTEGER NOT NULL,
    epoch INTEGER NOT NULL, mark INTEGER NOT NULL, root BLOB, is_settled INTEGER NOT NULL,
    UNIQUE (peer, is_outbound)) STRICT;
CREATE TABLE blocks (
    block_id BLOB PRIMARY KEY, lane_id INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
    state TEXT NOT NULL, message BLOB NOT NULL, answer BLOB, is_leader INTEGER NOT NULL) STRICT;
CREATE INDEX blocks_by_lane ON blocks (lane_id, start);
CREATE TABLE extents (
    lane_id INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL, file TEXT NOT NULL,
    file_offset INTEGER NOT NULL, state TEXT NOT NULL,
    PRIMARY KEY (lane_id, start)) STRICT, WITHOUT ROWID;
CREATE TABLE reserves (
    reserve_id INTEGER PRIMARY KEY AUTOINCREMENT, source TEXT NOT NULL, target TEXT NOT NULL,
    epoch INTEGER NOT NULL, grade TEXT NOT NULL, is_outbound INTEGER NOT NULL,
    assign_mark INTEGER NOT NULL, draw_mark INTEGER NOT NULL, retired_below INTEGER NOT NULL,
    state TEXT NOT NULL, UNIQUE (source, target, epoch)) STRICT;
CREATE TABLE reserve_epochs (
    source TEXT NOT NULL, target TEXT NOT NULL, highest INTEGER NOT NULL,
    PRIMARY KEY (source, target)) STRICT, WITHOUT ROWID;
CREATE TABLE appends (
    reserve_id INTEGER NOT NULL, first_slot INTEGER NOT NULL, count INTEGER NOT NULL, kind TEXT NOT NULL,
    file TEXT NOT NULL, file_offset INTEGER NOT NULL, inline BLOB, confirm BLOB, confirm_tag BLOB,
    is_confirmed INTEGER NOT NULL, created_s INTEGER NOT NULL,
    PRIMARY KEY (reserve_id, first_slot)) STRICT;
CREATE TABLE used_slots (
    reserve_id INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
    PRIMARY KEY (reserve_id, start)) STRICT, WITHOUT ROWID;
CREATE TABLE draw_times (
    reserve_id INTEGER NOT NULL, slot INTEGER NOT NULL, at_s INTEGER NOT NULL,
    PRIMARY KEY (reserve_id, slot)) STRICT, WITHOUT ROWID;
CREATE TABLE wrong_tags (
    slave TEXT NOT NULL, master TEXT NOT NULL, day INTEGER NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (slave, master, day)) STRICT, WITHOUT ROWID;
CREATE TABLE stored_keys (
    master TEXT NOT NULL, key_id BLOB NOT NULL, value BLOB NOT NULL, expires_at_s INTEGER NOT NULL,
    origin_domain TEXT NOT NULL, grade TEXT NOT NULL, state TEXT NOT NULL,
    PRIMARY KEY (master, key_id)) STRICT;
CREATE INDEX stored_keys_by_expiry ON stored_keys (expires_at_s);
CREATE TABLE stored_key_slaves (
    master TEXT NOT NULL, key_id BLOB NOT NULL, slave TEXT NOT NULL, is_delivered INTEGER NOT NULL,
    PRIMARY KEY (master, key_id, slave)) STRICT, WITHOUT ROWID;
CREATE TABLE jobs (
    job_id BLOB PRIMARY KEY, number INTEGER NOT NULL, kind TEXT NOT NULL, peer TEXT NOT NULL,
    state TEXT NOT NULL, payload BLOB NOT NULL, result BLOB, next_try_s INTEGER NOT NULL,
    attempts INTEGER NOT NULL, UNIQUE (peer, number)) STRICT;
CREATE TABLE inbound_results (
    source TEXT NOT NULL, job_id BLOB NOT NULL, number INTEGER NOT NULL, result BLOB NOT NULL,
    PRIMARY KEY (source, job_id)) STRICT;
CREATE INDEX inbound_results_by_number ON inbound_results (source, number);
"""

_VERSION_2 = """
ALTER TABLE jobs ADD COLUMN context BLOB NOT NULL DEFAULT x'';
CREATE TABLE border_exchanges (
    exchange_id BLOB PRIMARY KEY, is_outbound INTEGER NOT NULL, peer TEXT NOT NULL, initiator TEXT NOT NULL,
    targets TEXT NOT NULL, callback TEXT NOT NULL, owner TEXT NOT NULL, source TEXT NOT NULL,
    source_job BLOB NOT NULL, extension BLOB NOT NULL, give_up_ms INTEGER NOT NULL,
    created_s INTEGER NOT NULL, settled_s INTEGER NOT NULL) STRICT;
CREATE INDEX border_exchanges_by_source ON border_exchanges (source_job);
CREATE INDEX border_exchanges_open ON border_exchanges (is_outbound, give_up_ms) WHERE settled_s = 0;
CREATE INDEX border_exchanges_settled ON border_exchanges (peer, settled_s) WHERE settled_s > 0;
CREATE INDEX border_exchanges_by_association ON border_exchanges (peer, initiator, targets);
CREATE TABLE border_keys (
    is_outbound INTEGER NOT NULL, peer TEXT NOT NULL, key_id BLOB NOT NULL, exchange_id BLOB NOT NULL,
    state TEXT NOT NULL, value BLOB NOT NULL, value_mac BLOB NOT NULL, extension BLOB NOT NULL,
    acked TEXT NOT NULL, void_callback TEXT NOT NULL, is_void_asked INTEGER NOT NULL,
    is_peer_void INTEGER NOT NULL, is_kept INTEGER NOT NULL, revivals INTEGER NOT NULL,
    PRIMARY KEY (key_id, peer, is_outbound)) STRICT;
CREATE INDEX border_keys_by_exchange ON border_keys (exchange_id);
CREATE TABLE border_counts (
    is_outbound INTEGER NOT NULL, peer TEXT NOT NULL, state TEXT NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (peer, is_outbound, state)) STRICT, WITHOUT ROWID;
CREATE TRIGGER border_keys_put AFTER INSERT ON border_keys BEGIN
    INSERT INTO border_counts VALUES (NEW.is_outbound, NEW.peer, NEW.state, 1)
        ON CONFLICT DO UPDATE SET count = count + 1;
END;
CREATE TRIGGER border_keys_moved AFTER UPDATE OF state ON border_keys WHEN NEW.state != OLD.state BEGIN
    UPDATE border_counts SET count = count - 1
        WHERE peer = OLD.peer AND is_outbound = OLD.is_outbound AND state = OLD.state;
    INSERT INTO border_counts VALUES (NEW.is_outbound, NEW.peer, NEW.state, 1)
        ON CONFLICT DO UPDATE SET count = count + 1;
END;
CREATE TRIGGER border_keys_forgotten AFTER DELETE ON border_keys BEGIN
    UPDATE border_counts SET count = count - 1
        WHERE peer = OLD.peer AND is_outbound = OLD.is_outbound AND state = OLD.state;
END;
CREATE TABLE border_posts (
    job_id BLOB PRIMARY KEY, kind TEXT NOT NULL, exchange_id BLOB NOT NULL, peer TEXT NOT NULL,
    url TEXT NOT NULL, status TEXT NOT NULL, initiator TEXT NOT NULL, targets TEXT NOT NULL,
    key_ids BLOB NOT NULL, give_up_ms INTEGER NOT NULL) STRICT;
CREATE INDEX border_posts_by_exchange ON border_posts (exchange_id);
CREATE INDEX border_posts_by_time ON border_posts (give_up_ms);
CREATE TABLE border_carries (
    exchange_id BLOB NOT NULL, place TEXT NOT NULL, targets TEXT NOT NULL, state TEXT NOT NULL,
    PRIMARY KEY (exchange_id, place)) STRICT, WITHOUT ROWID;
CREATE TABLE border_calls (
    call_id INTEGER PRIMARY KEY AUTOINCREMENT, purpose TEXT NOT NULL, exchange_id BLOB NOT NULL,
    kme TEXT NOT NULL, key_ids BLOB NOT NULL, job_id BLOB) STRICT;
CREATE INDEX border_calls_by_exchange ON border_calls (exchange_id);
CREATE INDEX border_calls_by_job ON border_calls (job_id);
CREATE TABLE border_reports (
    source TEXT NOT NULL, job_id BLOB NOT NULL, open_ids BLOB NOT NULL, kept_ids BLOB NOT NULL,
    PRIMARY KEY (source, job_id)) STRICT;
CREATE TABLE foreign_buffer (
    master TEXT NOT NULL, slave TEXT NOT NULL, key_id BLOB NOT NULL UNIQUE, value BLOB NOT NULL,
    grade TEXT NOT NULL, border TEXT NOT NULL, expires_at_s INTEGER NOT NULL) STRICT;
"""

MIGRATIONS: tuple[str, ...] = (_VERSION_1, _VERSION_2)
VERSION = len(MIGRATIONS)
