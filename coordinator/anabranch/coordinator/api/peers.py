"""Who is enrolled: tokens that were given, certificates that were issued and revoked.

A SQLite file of the API's own: looked into at every call, so that a revocation counts at once.
Loads no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.coordinator.api.identity import FEDERATION, Identity, Role

EVERY = "*"
"""Stands for all federations."""

SCHEMA = """
create table if not exists tokens (
    hash text primary key, organisation text not null, name text not null, role text not null,
    federations text not null, not_after_s real not null, used_s real
);
create table if not exists certificates (
    serial text primary key, organisation text not null, name text not null, role text not null,
    federations text not null, not_after_s real not null, revoked_s real, issued_s real not null
);
create index if not exists certificates_name on certificates (name);
create index if not exists certificates_organisation on certificates (organisation);
"""


class NotEnrolledError(ValueError):
    """A token or an enrolment that does not hold.

    Attributes:
        code: Short reason for machines.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Grant:
    """What a peer was enrolled for.

    Attributes:
        identity: Who it is.
        federations: Names of those it takes part in; ``*`` stands for all.
    """

    identity: Identity
    federations: tuple[str, ...]

    def covers(self, federation: str) -> bool:
        """Whether it takes part in a federation."""
        return EVERY in self.federations or federation in self.federations


@dataclass(frozen=True)
class Issued:
    """A certificate.

    Attributes:
        grant: What it stands for.
        serial: Its number, in hexadecimal.
        not_after_s: When it ends; earlier than it says itself once there is a newer one.
        revoked_s: When it was revoked; None where it was not.
    """

    grant: Grant
    serial: str
    not_after_s: float
    revoked_s: float | None


class Peers:
    """The register.

    Args:
        path: Made when missing.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Nobody else may read who is invited.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        # Every call reads, and is not to wait for a writer's flush to the disk.
        self._lock, self._reads = threading.Lock(), threading.Lock()
        self._base, self._look = _connect(path), _connect(path)
        self._base.execute("pragma journal_mode=wal")
        self._base.execute("pragma synchronous=full")
        self._base.executescript(SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._look.close()
        self._base.close()

    def invite(self, grant: Grant, valid_s: float) -> tuple[str, float]:
        """A one-time token, and when it ends; of it only the hash is kept.

        Raises:
            NotEnrolledError: As ``redeem``, for a reason that is known already.
            ValueError: A name is none.
        """
        for name in grant.federations:
            if name != EVERY and not FEDERATION.fullmatch(name):
                raise ValueError(f"{name[:100]!r} is no federation's name")
        if not grant.federations:
            raise ValueError('name the federations it may take part in; "*" stands for all')
        if grant.identity.role is Role.CLIENT and EVERY in grant.federations:
            raise ValueError("a client takes part in federations by name; name them")
        token, not_after_s = secrets.token_urlsafe(32), time.time() + valid_s
        with self._writing() as base:
            self._check(base, grant)
            base.execute(
                "insert into tokens values (?, ?, ?, ?, ?, ?, null)",
                (token_hash(token).hex(), *_columns(grant), not_after_s),
            )
        return token, not_after_s

    def look(self, token: str) -> Grant:
        """Whom a token is for.

        Raises:
            NotEnrolledError: ``token``: there is none such, it was used, or it has ended.
        """
        with self._reads:
            row = self._look.execute(
                "select * from tokens where hash = ?", (token_hash(token).hex(),)
            ).fetchone()
        if row is None:
            raise NotEnrolledError("token", "there is no such token")
        if row["used_s"] is not None:
            raise NotEnrolledError("token-used", "the token was used before; ask for another")
        if row["not_after_s"] < time.time():
            raise NotEnrolledError("token-expired", "the token has ended; ask for another")
        return _grant(row)

    def redeem(self, token: str, serial: str, not_after_s: float) -> None:
        """Use a token up for a certificate.

        Raises:
            NotEnrolledError: As ``look``; ``name-taken``: another organisation's peer has this
                name; or ``vote-taken``: its organisation has a client in one of the federations.
        """
        grant = self.look(token)
        with self._writing() as base:
            self._check(base, grant)
            used = base.execute(
                "update tokens set used_s = ? where hash = ? and used_s is null",
                (time.time(), token_hash(token).hex()),
            )
            if used.rowcount != 1:
                raise NotEnrolledError("token-used", "the token was used before; ask for another")
            _add(base, grant, serial, not_after_s)

    def renew(self, old: Issued, serial: str, not_after_s: float, overlap_s: float) -> None:
        """Note a peer's new certificate; its earlier ones count a little longer only."""
        until = time.time() + overlap_s
        with self._writing() as base:
            base.execute(
                "update certificates set not_after_s = min(not_after_s, ?) where name = ? "
                "and organisation = ?",
                (until, old.grant.identity.name, old.grant.identity.organisation),
            )
            _add(base, old.grant, serial, not_after_s)

    def revoke(self, name: str) -> int:
        """Let none of a peer's certificates and tokens count any more; returns how many held."""
        now = time.time()
        with self._writing() as base:
            base.execute(
                "update tokens set used_s = ? where name = ? and used_s is null", (now, name)
            )
            done = base.execute(
                "update certificates set revoked_s = ? where name = ? and revoked_s is null",
                (now, name),
            )
            return done.rowcount

    def find(self, serial: str) -> Issued | None:
        """A certificate that was issued here."""
        with self._reads:
            row = self._look.execute(
                "select * from certificates where serial = ?", (serial,)
            ).fetchone()
        return None if row is None else _issued(row)

    def named(self, name: str) -> list[Issued]:
        """Every certificate of a peer, oldest first."""
        return self._list("where name = ? order by issued_s", name)

    def every(self) -> list[Issued]:
        """Every certificate, by name and time."""
        return self._list("order by name, issued_s")

    def _list(self, rest: str, *values: str) -> list[Issued]:
        with self._reads:
            rows = self._look.execute(f"select * from certificates {rest}", values).fetchall()
        return [_issued(row) for row in rows]

    def _check(self, base: sqlite3.Connection, grant: Grant) -> None:
        """Refuse what would give an organisation a second vote, or a name to two."""
        who = grant.identity
        live = "revoked_s is null and not_after_s > ?"
        other = base.execute(
            "select organisation from certificates where name = ? and organisation != ? "
            f"and {live}",
            (who.name, who.organisation, time.time()),
        ).fetchone()
        if other is not None:
            raise NotEnrolledError("name-taken", f"{who.name} is a peer of another organisation")
        if who.role is not Role.CLIENT:
            return
        rows = base.execute(
            "select name, federations from certificates where organisation = ? and name != ? "
            f"and role = ? and {live}",
            (who.organisation, who.name, Role.CLIENT.value, time.time()),
        )
        for row in rows:
            both = sorted(set(json.loads(row["federations"])) & set(grant.federations))
            if both:
                raise NotEnrolledError(
                    "vote-taken",
                    f"{who.organisation} has a client in {both[0]} already: {row['name']}; each "
                    "organisation has one vote, revoke that one first",
                )

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._base.execute("begin immediate")
            try:
                yield self._base
            except BaseException:
                self._base.execute("rollback")
                raise
            self._base.execute("commit")


def _connect(path: Path) -> sqlite3.Connection:
    base = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    base.row_factory = sqlite3.Row
    return base


def token_hash(token: str) -> bytes:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).digest()


def _columns(grant: Grant) -> tuple[str, str, str, str]:
    who = grant.identity
    return who.organisation, who.name, who.role.value, json.dumps(list(grant.federations))


def _add(base: sqlite3.Connection, grant: Grant, serial: str, not_after_s: float) -> None:
    base.execute(
        "insert into certificates values (?, ?, ?, ?, ?, ?, null, ?)",
        (serial, *_columns(grant), not_after_s, time.time()),
    )


def _grant(row: Any) -> Grant:
    identity = Identity(row["organisation"], row["name"], Role(row["role"]))
    names: Sequence[str] = json.loads(row["federations"])
    return Grant(identity, tuple(names))


def _issued(row: Any) -> Issued:
    return Issued(_grant(row), row["serial"], row["not_after_s"], row["revoked_s"])
