"""What key stores on SQL databases share: all logic of `KeyStore`, over a few hooks that each database fills in.

Rules of this file:
- SQL that every database speaks, with `?` for each value. What differs is a hook, at the end of the class.
- A transaction reads the destruction sequence first, after it has its lock; what is held in memory is forgotten when
  the sequence moved. The key management service is not called under a lock that others wait for.
- `wrapping_keys` has one row per generation. What is new goes under the newest of its day, as read under the lock; a
  generation is minted, and goes, under the exclusive lock. So nothing ends up under one that is gone.
- A key is destroyed by overwriting it where it lies, as wide as it was, and its generation by `GONE`: an epoch with
  such a row is its own tombstone. Only persons' rows may be deleted instead (the hooks say how).
- After a destruction: commit, raise the KMS counter, then let no file keep the overwritten bytes (`_settle`).
"""

import os
import secrets
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from enum import Enum
from hashlib import blake2b
from struct import Struct
from typing import Any, TypeVar

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from processors.keyring import EpochKey, EpochRef, Needs, PersonRef, PersonSecret
from schemas.catalog import Domain
from schemas.errors import KeysBusy, KeysUnusable, TokensChange
from schemas.sealed import NONCE_BYTES, SECRET_BYTES, KeyId
from streams.keys.ledger import AT_WILL, LEDGER_TABLES, SqlLedger
from streams.keys.store import (
    NEVER,
    Buried,
    Destroyed,
    Fetched,
    Gone,
    KeyStatus,
    Kms,
    KmsMaker,
    Known,
    TokenKey,
    TokenKeys,
)
from streams.keys.wrapping import (
    FOREVER,
    GONE,
    SID_BYTES,
    WRAPPED_BYTES,
    Ciphers,
    day_in,
    day_of,
    epoch_aad,
    generation,
    kms_generation,
    kms_name,
    next_generation,
    padded,
    person_aad,
    person_aad_head,
    secret_aad,
    sid_bytes,
    today,
    token_aad,
    unpadded,
    unwrap,
    wrap,
)

SCHEMA_VERSION = 2
SEAL_BLOCK = 2**20
"""Seals reserved at a time, so that a process writes here once in a million seals of an epoch."""
STEP = 5_000
"""Rows that a re-wrap or a burial changes in one transaction."""
CHUNK = 500
"""Values in one IN list."""
ROUNDS = 5
"""So often something is begun anew because another process came between."""

TABLES = (
    """
CREATE TABLE meta (name {text} PRIMARY KEY, value {text} NOT NULL);
CREATE TABLE wrapping_keys (kek {text} PRIMARY KEY, wrapped {bytes} NOT NULL);
CREATE TABLE token_keys (version {int} PRIMARY KEY, state {text} NOT NULL, kek {text} NOT NULL,
    wrapped {bytes} NOT NULL);
CREATE TABLE epoch_keys (domain {text} NOT NULL, owner {text} NOT NULL, epoch {text} NOT NULL, version {int} NOT NULL,
    kek {text} NOT NULL, deadline_s {int}, wrapped {bytes} NOT NULL, seals {text} NOT NULL,
    PRIMARY KEY (domain, owner, epoch, version));
CREATE INDEX epoch_keys_kek ON epoch_keys (kek);
CREATE TABLE sid_tombstones (sid {bytes} PRIMARY KEY, at_s {int} NOT NULL);
CREATE TABLE secrets (name {bytes} PRIMARY KEY, kek {text} NOT NULL, wrapped {bytes} NOT NULL);
CREATE TABLE stale (kek {text} PRIMARY KEY, at_s {int} NOT NULL);
CREATE TABLE leases (process_id {text} PRIMARY KEY, expires_s {real} NOT NULL, seen {int} NOT NULL);
"""
    + LEDGER_TABLES
)
"""All tables but those of persons, which are each database's own. `{text}` sorts by its bytes; `{int}` has 64 bits."""

Row = tuple[str, bytes, str, bytes, str, bytes]
"""A person's row: owner, token, month, sid, generation, wrapped secret."""

_PERSON_DRAW = Struct(f"{SID_BYTES}s{SECRET_BYTES}s{NONCE_BYTES}s")
_SECRET_WRAPPED_BYTES = NONCE_BYTES + len(padded(b"")) + 16
_STALE_LEASE_S = 86_400.0
_ROTATED = "another process has rotated the token key meanwhile; what it did stands"
_EPOCH = "domain = ? AND owner = ? AND epoch = ?"
_T = TypeVar("_T")


class Mode(Enum):
    """What a transaction may do, and beside what.

    `READ`: read one state of the store. `SHARE`: write, beside others in this mode. `EXCLUSIVE`: write, alone among
    those that write; it begins when they have ended, and what they wrote is seen.
    """

    READ = "read"
    SHARE = "share"
    EXCLUSIVE = "exclusive"


class _NotBegun(KeysBusy):
    """A day has no generation: none was needed before, or another process just buried it."""

    def __init__(self, day: str) -> None:
        super().__init__("another process buries the same day", day=day.rstrip())
        self.day = day


class SqlKeyStore(ABC):
    """The keys of one deployment (`KeyStore`). One instance may be shared by threads; calls then take turns.

    A subclass opens its database, then calls `_attach`.
    """

    store_id: str
    kms: Kms

    def __init__(self, clock: Callable[[], float], max_seals: int) -> None:
        self.ledger = SqlLedger(self)
        self._clock = clock
        self._max_seals = max_seals
        self._lock = threading.Lock()
        self._sequence = -1
        self._ciphers = Ciphers(clock)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.store_id})"

    def _attach(self, open_kms: KmsMaker, *, outdated: bool) -> None:
        """Open the key management service of this store, and compare the two.

        Raises KeysUnusable if it is another's, or if the store was restored from a backup (unless `outdated`).
        """
        with self._transaction(Mode.READ):
            meta: dict[str, str] = dict(self._run("SELECT name, value FROM meta"))
        check_version(meta)
        self.store_id = meta["store_id"]
        self.kms = open_kms(self.store_id, False)
        try:
            self._compare(bytes.fromhex(meta["root_check"]), outdated=outdated)
        except BaseException:
            self.kms.close()
            raise

    def _compare(self, check: bytes, *, outdated: bool) -> None:
        if not self.kms.trusts(check):
            raise KeysUnusable(
                "the key management service is not the one of this key store, or its root key is not;"
                " restore the right one from its backup",
                store=self.store_id,
            )
        if check != self.kms.check:
            self._note_root()
        if outdated:
            return
        counter = self.kms.counter()  # first: another process may destroy between
        sequence = self.sequence()
        if sequence < counter:
            raise KeysUnusable(
                "the key store is older than the last destruction: it was restored from a backup;"
                " run: streamveil keys reconcile",
                store=self.store_id,
            )
        if sequence > counter:  # killed between the two
            self.kms.raise_counter(sequence)

    def close(self) -> None:
        """Free what is held and forget the wrapping keys; idempotent."""
        with self._lock:
            self._ciphers.clear()
            self._close()
        self.kms.close()

    def sequence(self) -> int:
        """Return the destruction sequence."""
        with self._transaction(Mode.READ) as sequence:
            return sequence

    def now_s(self) -> float:
        """Return the time by the store's clock, Unix s."""
        with self._transaction(Mode.READ):
            return self._now_s()

    # --- sealing ---------------------------------------------------------------------------------------------

    def token_keys(self) -> TokenKeys:
        """Return the token keys; the first was made together with the store."""
        with self._transaction(Mode.READ):
            held = {}
            for version, state, kek, wrapped in self._run("SELECT version, state, kek, wrapped FROM token_keys"):
                if state != "deleted":
                    key = unwrap(self._cipher(kek), wrapped, token_aad(version))
                    held[version] = state, TokenKey(version, key)
            current = [key for state, key in held.values() if state == "current"]
            if len(current) != 1:
                raise KeysUnusable("the key store has no token key; restore it from its backup", store=self.store_id)
            others = tuple(held[version][1] for version in sorted(held) if held[version][0] != "current")
            return TokenKeys(current[0], others, self._changing())

    def fetch(self, needs: Needs, now_s: int) -> Fetched:
        """Get or create what is needed, as `KeyStore.fetch`; takes a lock only to create or to reserve.

        A person whose deadline is at or before `now_s` is left out. A secret whose day is over is dead: its sid gets a
        tombstone and the person a new secret.
        """
        date = today(now_s)
        alive = {deadline: day_of(deadline) for deadline in set(needs.persons.values()) if _alive(deadline, now_s)}
        days = {ref: alive[deadline] for ref, deadline in needs.persons.items() if deadline in alive}
        epochs = {ref: need for ref, need in needs.epochs.items() if _alive(need[0], now_s)}
        if any(seals > self._max_seals for _, seals in epochs.values()):
            raise ValueError("more seals asked for than one key may give")
        with self._transaction(Mode.READ) as sequence:
            persons, _ = self._known_persons(days)
            missing = {} if len(persons) == len(days) else {ref: days[ref] for ref in days if ref not in persons}
            absent = self._warm({*missing.values(), *(_epoch_day(ref, need[0]) for ref, need in epochs.items())})
        if not missing and not epochs:
            return Fetched({}, {}, persons, sequence)

        def create() -> Fetched:
            made = persons | self._create_persons(missing, date)
            return Fetched(*self._reserve(epochs, now_s), made, sequence)  # the first: all of this is true for it

        return self._written(Mode.EXCLUSIVE if epochs else Mode.SHARE, absent, create)

    def _known_persons(self, days: Mapping[PersonRef, str]) -> tuple[dict[PersonRef, PersonSecret], list[Row]]:
        """Return the secrets kept to their day at least, and the rows of those that are not."""
        groups: defaultdict[tuple[str, str], dict[bytes, PersonRef]] = defaultdict(dict)
        for ref in days:
            groups[ref.owner, ref.month][ref.token] = ref
        persons: dict[PersonRef, PersonSecret] = {}
        short: list[Row] = []
        held = self._ciphers.held
        for (owner, month), refs in groups.items():
            head = person_aad_head(owner, month)
            for token, sid, kek, wrapped in self._find_persons(owner, month, list(refs)):
                ref = refs[token]
                if kek > days[ref]:  # a generation sorts behind its day
                    cipher = held.get(kek) or self._cipher(kek)
                    persons[ref] = PersonSecret(sid.hex(), unwrap(cipher, wrapped, head + sid + token))
                else:
                    short.append((owner, token, month, sid, kek, wrapped))
        return persons, short

    def _create_persons(self, missing: Mapping[PersonRef, str], date: str) -> dict[PersonRef, PersonSecret]:
        """Return a secret for each, kept to its day at least: the winner's, re-wrapped or new."""
        if not missing:
            return {}
        newest = {day: self._newest(day) for day in set(missing.values())}
        persons, short = self._known_persons(missing)
        moves: list[tuple[str, bytes, Row]] = []
        dead: list[Row] = []
        for row in short:
            owner, token, month, sid, kek, wrapped = row
            if day_in(kek) < date:
                dead.append(row)
                continue
            ref = PersonRef(owner, token, month)
            secret = unwrap(self._cipher(kek), wrapped, person_aad(ref, sid))
            later, cipher = newest[missing[ref]]
            persons[ref] = PersonSecret(sid.hex(), secret)
            moves.append((later, wrap(cipher, secret, person_aad(ref, sid)), row))
        self._forget(dead, date)
        if moves:
            self._move_persons(moves)
        raced = [row for _, _, row in moves]  # somebody else may have been faster to move, or to add
        new = [ref for ref in missing if ref not in persons]
        if new:
            made: list[Row] = []
            draws = _PERSON_DRAW.iter_unpack(os.urandom(_PERSON_DRAW.size * len(new)))  # one call of the system for all
            for ref, (sid, secret, nonce) in zip(new, draws, strict=True):
                kek, cipher = newest[missing[ref]]
                wrapped = nonce + cipher.encrypt(nonce, secret, person_aad(ref, sid))
                made.append((ref.owner, ref.token, ref.month, sid, kek, wrapped))
                persons[ref] = PersonSecret(sid.hex(), secret)
            raced += self._add_persons(made, self._current_token())
        if raced:
            self._take_winners(missing, persons, {PersonRef(*row[:3]) for row in raced})
        return persons

    def _take_winners(
        self, missing: Mapping[PersonRef, str], persons: dict[PersonRef, PersonSecret], refs: set[PersonRef]
    ) -> None:
        """Put what the store holds now in the place of what somebody else may have been faster with."""
        found, _ = self._known_persons({ref: missing[ref] for ref in refs})
        if len(found) != len(refs):
            raise KeysBusy("another process changes the same keys")
        persons |= found

    def _reserve(
        self, wanted: Mapping[EpochRef, tuple[int | None, int]], now_s: int
    ) -> tuple[dict[EpochRef, EpochKey], dict[EpochRef, int]]:
        """Return the keys of the epochs that are not dead, and a block of seals of each."""
        keys: dict[EpochRef, EpochKey] = {}
        granted: dict[EpochRef, int] = {}
        rows = self._epoch_rows(wanted)
        made: list[tuple[Any, ...]] = []
        used_up: list[tuple[Any, ...]] = []
        for ref, (asked_s, seals) in wanted.items():
            versions = rows.get(ref, {})
            deadline_s, version, used = asked_s, 0, self._max_seals
            if versions:
                version = max(versions)
                kek, deadline_s, wrapped, text = versions[version]
                used = int(text)
                if not _alive(deadline_s, now_s) or any(row[0] == GONE for row in versions.values()):
                    continue
            if used + seals <= self._max_seals:
                key_id = KeyId(*ref, version)
                key = unwrap(self._cipher(kek), wrapped, epoch_aad(key_id, deadline_s))
                granted[ref] = min(max(seals, SEAL_BLOCK), self._max_seals - used)
                used_up.append((_count(used + granted[ref]), *key_id))
            else:
                key_id, key = KeyId(*ref, version + 1), os.urandom(SECRET_BYTES)
                kek, cipher = self._newest(_epoch_day(ref, deadline_s))
                granted[ref] = min(max(seals, SEAL_BLOCK), self._max_seals)
                wrapped = wrap(cipher, key, epoch_aad(key_id, deadline_s))
                made.append((*key_id, kek, deadline_s, wrapped, _count(granted[ref])))
            keys[ref] = EpochKey(key_id, key, deadline_s)
        self._run_many("INSERT INTO epoch_keys VALUES (?, ?, ?, ?, ?, ?, ?, ?)", made)
        self._run_many(f"UPDATE epoch_keys SET seals = ? WHERE {_EPOCH} AND version = ?", used_up)
        return keys, granted

    def _epoch_rows(self, refs: Iterable[EpochRef]) -> dict[EpochRef, dict[int, tuple[str, int | None, bytes, str]]]:
        """Return all versions of epochs: version → generation, deadline, wrapped key, seals reserved."""
        found: dict[EpochRef, dict[int, tuple[str, int | None, bytes, str]]] = {}
        for chunk in chunks(list(refs)):
            for domain, owner, epoch, version, kek, deadline_s, wrapped, seals in self._run(
                f"WITH asked (d, o, e) AS (VALUES {','.join(['(?, ?, ?)'] * len(chunk))}) "
                "SELECT domain, owner, epoch, version, kek, deadline_s, wrapped, seals "
                "FROM asked JOIN epoch_keys ON domain = d AND owner = o AND epoch = e",
                [part for ref in chunk for part in ref],
            ):
                found.setdefault(EpochRef(domain, owner, epoch), {})[version] = kek, deadline_s, wrapped, seals
        return found

    def renew_lease(self, process_id: str, duration_s: float, seen_sequence: int) -> int:
        """Extend a lease to `duration_s` from now, durable on return; return the current destruction sequence."""
        with self._transaction(Mode.SHARE) as sequence:
            now_s = self._now_s()
            self._run(
                "INSERT INTO leases VALUES (?, ?, ?) "
                "ON CONFLICT (process_id) DO UPDATE SET expires_s = excluded.expires_s, seen = excluded.seen",
                (process_id, now_s + duration_s, seen_sequence),
            )
            self._run("DELETE FROM leases WHERE expires_s < ?", (now_s - _STALE_LEASE_S,))
        return sequence

    def drop_lease(self, process_id: str) -> None:
        """End a process's lease at once; idempotent."""
        with self._transaction(Mode.SHARE):
            self._run("DELETE FROM leases WHERE process_id = ?", (process_id,))

    def leases(self) -> Mapping[str, int]:
        """Return process id → destruction sequence seen, of the leases alive by the store's clock."""
        with self._transaction(Mode.READ):
            return dict(self._run("SELECT process_id, seen FROM leases WHERE expires_s > ?", (self._now_s(),)))

    # --- opening ---------------------------------------------------------------------------------------------

    def open_epochs(self, ids: Iterable[KeyId], now_s: int) -> dict[KeyId, EpochKey | Gone]:
        """Return the keys named, each alive at `now_s`, or why it is gone."""
        found: dict[KeyId, EpochKey | Gone] = dict.fromkeys(ids, Gone.ABSENT)
        with self._transaction(Mode.READ):
            rows = self._epoch_rows({EpochRef(*key_id[:3]) for key_id in found})
            for key_id in found:
                versions = rows.get(EpochRef(*key_id[:3]), {})
                if any(row[0] == GONE for row in versions.values()):
                    found[key_id] = Gone.DESTROYED
                elif key_id.version in versions:
                    kek, deadline_s, wrapped, _ = versions[key_id.version]
                    if _alive(deadline_s, now_s):
                        key = unwrap(self._cipher(kek), wrapped, epoch_aad(key_id, deadline_s))
                        found[key_id] = EpochKey(key_id, key, deadline_s)
                    else:
                        found[key_id] = Gone.DESTROYED
        return found

    def open_persons(self, sids: Iterable[str], now_s: int) -> dict[str, PersonSecret | Gone]:
        """Return the secrets named by sid, or why each is gone; one whose day is over at `now_s` is destroyed."""
        found: dict[str, PersonSecret | Gone] = dict.fromkeys(sids, Gone.ABSENT)
        date = today(now_s)
        known = [sid for text in found if (sid := sid_bytes(text))]
        with self._transaction(Mode.READ):
            for owner, token, month, sid, kek, wrapped in self._find_sids(known):
                text = sid.hex()
                if day_in(kek) < date:
                    found[text] = Gone.DESTROYED
                else:
                    aad = person_aad_head(owner, month) + sid + token
                    found[text] = PersonSecret(text, unwrap(self._cipher(kek), wrapped, aad))
            for chunk in chunks(known):
                for (sid,) in self._run(f"SELECT sid FROM sid_tombstones WHERE sid IN ({marks(chunk)})", chunk):
                    found[sid.hex()] = Gone.DESTROYED
        return found

    def persons_of(self, tokens: Sequence[bytes], as_of_s: int | None = None) -> list[Known]:
        """Return the secrets of a person whose day was not over then, or is not now, by owner and month."""
        with self._transaction(Mode.READ):
            date = today(self._now_s() if as_of_s is None else as_of_s)
            rows = self._find_tokens(list(tokens))
        return sorted(
            Known(owner, month, sid.hex(), day_in(kek).rstrip())
            for owner, _, month, sid, kek, _ in rows
            if day_in(kek) >= date
        )

    def restricted(self, sids: Iterable[str]) -> set[str]:
        """Return those of the sids whose person's data is restricted; one look where nobody's is."""
        found: set[str] = set()
        force = "kind = 'restriction' AND ended_s IS NULL"
        with self._transaction(Mode.READ):
            if not self._run(f"SELECT 1 FROM marks WHERE {force} LIMIT 1"):
                return found
            rows = self._find_sids([sid for text in sids if (sid := sid_bytes(text))])
            for chunk in chunks(list({row[1] for row in rows})):
                query = (
                    f"SELECT owner, token FROM marks JOIN mark_tokens ON mark_id = id WHERE {force} "
                    f"AND token IN ({marks(chunk)})"
                )
                hit = {(owner, bytes(token)) for owner, token in self._run(query, chunk)}
                found |= {row[3].hex() for row in rows if (row[0], row[1]) in hit}
        return found

    # --- destruction -----------------------------------------------------------------------------------------

    def destroy_epoch(self, ref: EpochRef) -> int:
        """Destroy all versions of an epoch key, leave a tombstone, and return the new destruction sequence.

        On return no file of the store holds them, wrapped or not, and the KMS counter is raised. May raise KeysBusy,
        KmsUnavailable when they are destroyed but that is still to be done; calling again finishes it.
        """
        with self._transaction(Mode.EXCLUSIVE) as sequence:
            versions = self._epoch_rows([ref]).get(ref, {})
            self._note_stale({row[0] for row in versions.values()}, today(self._now_s()))
            self._run(
                f"UPDATE epoch_keys SET kek = ?, wrapped = ? WHERE {_EPOCH}", (GONE, os.urandom(WRAPPED_BYTES), *ref)
            )
            if not versions:
                self._run(
                    "INSERT INTO epoch_keys VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (*ref, 0, GONE, None, os.urandom(WRAPPED_BYTES), _count(0)),
                )
            self._bump(sequence)
        return self._settled(sequence + 1)

    def destroy_persons(self, owner: str, tokens: Sequence[bytes]) -> Destroyed:
        """Destroy an owner's secrets of a person and what maps to their sids; durability and errors as above."""
        with self._transaction(Mode.EXCLUSIVE) as sequence:
            rows = [row for row in self._find_tokens(list(tokens)) if row[0] == owner]
            self._forget(rows, today(self._now_s()))
            self._bump(sequence)
        return Destroyed(self._settled(sequence + 1), tuple(sorted(row[3].hex() for row in rows)))

    def destroy_sids(self, sids: Iterable[str]) -> Destroyed:
        """Destroy secrets named by sid; one that is not there gets its tombstone all the same."""
        named = sorted({sid for text in sids if (sid := sid_bytes(text))})
        with self._transaction(Mode.EXCLUSIVE) as sequence:
            self._forget(self._find_sids(named), today(self._now_s()))
            self._add_tombstones(named)
            self._bump(sequence)
        return Destroyed(self._settled(sequence + 1), tuple(sid.hex() for sid in named))

    def _forget(self, rows: Collection[Row], date: str) -> None:
        """Tombstone the sids and let nothing be left of the rows that names anybody or holds a secret."""
        if rows:
            self._add_tombstones([row[3] for row in rows])
            self._note_stale({row[4] for row in rows}, date)
            self._forget_persons(rows)

    def _add_tombstones(self, sids: Iterable[bytes]) -> None:
        at_s = int(self._now_s())
        query = "INSERT INTO sid_tombstones VALUES (?, ?) ON CONFLICT (sid) DO NOTHING"
        self._run_many(query, [(sid, at_s) for sid in sids])

    def _note_stale(self, keks: Iterable[str], date: str) -> None:
        """Note of which generations something was destroyed before its day."""
        at_s = int(self._now_s())
        query = "INSERT INTO stale VALUES (?, ?) ON CONFLICT (kek) DO NOTHING"
        self._run_many(query, [(kek, at_s) for kek in keks if kek != GONE and day_in(kek) >= date])

    def due_epochs(self, now_s: int) -> list[tuple[EpochRef, int]]:
        """Return the epochs whose deadline is at or before `now_s` and whose keys are still there, by it."""
        query = (
            "SELECT domain, owner, epoch, min(deadline_s) FROM epoch_keys WHERE kek > ? AND kek < ? "
            "AND deadline_s <= ? GROUP BY domain, owner, epoch ORDER BY 4, 1, 2, 3"
        )
        with self._transaction(Mode.READ):
            rows = self._run(query, (GONE, f"{today(now_s)}/", now_s))  # the character after the dot
        return [(EpochRef(*ref), deadline_s) for *ref, deadline_s in rows]

    def sids_of(self, owner: str) -> Iterator[list[str]]:
        """Yield the sids of all secrets of an owner, a step at a time, which may be destroyed in between."""
        for sids in self._sids_of(owner):
            yield [sid.hex() for sid in sids]

    def due_days(self, now_s: int) -> list[str]:
        """Return the destruction days that are over at `now_s` and not buried yet, oldest first."""
        with self._transaction(Mode.READ):
            days = {day_in(kek) for (kek,) in self._run("SELECT kek FROM wrapping_keys")}
        days |= {day_in(kms_generation(name)) for name in self.kms.names()}
        return sorted(day for day in days if day < today(now_s))

    def bury_day(self, day: str, now_s: int) -> Buried:
        """Delete all that is wrapped under a day that is over, then its KEKs; idempotent, in steps."""
        given_up = day == AT_WILL and self._is_lost(day)
        if day == NEVER or day_of_text(day) != day or (day >= today(now_s) and not given_up):
            raise ValueError("not a destruction day that is over")
        named = [kek for name in self.kms.names() if day_in(kek := kms_generation(name)) == day]
        persons = 0
        for _ in range(ROUNDS):
            persons += self._bury_persons(day)
            buried = self._bury_rest(day, named)
            if buried is not None:
                sequence, epochs, keks = buried
                self._settled(sequence)
                for kek in sorted({*named, *keks}):
                    self.kms.destroy(kms_name(kek))
                return Buried(epochs, persons)
        raise KeysBusy("people of this day come as fast as they are buried", day=day)

    def _bury_rest(self, day: str, named: Collection[str]) -> tuple[int, int, list[str]] | None:
        """Destroy what is left of a day whose people are buried; return the sequence, the epochs and the generations.

        None: people came meanwhile, by a re-wrap or because the day is not over, and nothing was done. The sequence
        moves also where only the service knows the day: whoever begins it now must not do so under a KEK that goes.
        """
        with self._transaction(Mode.EXCLUSIVE) as before:
            sequence, keks = before, self._generations(day)
            epochs = 0
            if keks:
                if self._has_persons(keks):
                    return None
                under = f"kek IN ({marks(keks)})"
                ((epochs,),) = self._run(f"SELECT count(*) FROM epoch_keys WHERE {under}", keks)
                self._run(
                    f"UPDATE epoch_keys SET kek = ?, wrapped = ? WHERE {under}",
                    (GONE, os.urandom(WRAPPED_BYTES), *keks),
                )
                self._run(
                    f"UPDATE secrets SET kek = ?, wrapped = ? WHERE {under}",
                    (GONE, os.urandom(_SECRET_WRAPPED_BYTES), *keks),
                )
                self._drop_generations(keks)
            if keks or named:
                sequence = self._bump(before)
            self._run("DELETE FROM stale WHERE kek > ? AND kek < ?", _around(day))
            return sequence, epochs, keks

    def rewrap(self, day: str) -> int:
        """Move what is alive under a day to a new generation, destroy the old KEK; return the rows moved."""
        wide = day.ljust(len(FOREVER))
        moved = self._rewrap(wide)
        if self._is_stale(wide):  # it only finished one that began before the last destruction
            moved += self._rewrap(wide)
        return moved

    def _is_stale(self, day: str) -> bool:
        with self._transaction(Mode.READ):
            return self._run("SELECT 1 FROM stale WHERE kek > ? AND kek < ? LIMIT 1", _around(day)) != []

    def _rewrap(self, wide: str) -> int:
        """Finish a day's re-wrap that is under way, or do one; return the rows moved. Not of a day that is over."""
        with self._transaction(Mode.READ):
            over = wide < today(self._now_s())
            keks = self._generations(wide)
        if not keks or over:
            return 0
        if len(keks) == 1 and not self._older_names(keks[-1]):
            keks.append(self._mint(keks[-1]))
        *older, newest = keks
        with self._transaction(Mode.READ):
            ciphers = {kek: self._cipher(kek) for kek in keks}
        moved = 0
        if older:
            moved = self._rewrap_rows(older, newest, ciphers)
            with self._transaction(Mode.EXCLUSIVE) as before:
                if self._is_used(older):
                    raise KeysBusy("rows are still under the wrapping key of before: re-wrap again", day=wide.rstrip())
                self._drop_generations(older)
                sequence = self._bump(before)
            self._settled(sequence)
        for name in self._older_names(newest):
            self.kms.destroy(name)
        with self._transaction(Mode.EXCLUSIVE):  # last: while it is noted, somebody will call again
            self._run("DELETE FROM stale WHERE kek > ? AND kek < ?", (_around(wide)[0], newest))
        return moved

    def _older_names(self, newest: str) -> list[str]:
        """Return the names of the KEKs of a day's generations before one."""
        of = {name: kms_generation(name) for name in self.kms.names()}
        return [name for name, kek in of.items() if day_in(kek) == day_in(newest) and kek < newest]

    def _mint(self, newest: str) -> str:
        """Make a day's next generation, unless somebody else just did; return the newest."""
        target, key = next_generation(newest), secrets.token_bytes(SECRET_BYTES)
        wrapped = self.kms.wrap(kms_name(target), key)
        with self._transaction(Mode.EXCLUSIVE) as before:
            found = self._generations(day_in(newest))
            if not found or found[-1] != newest:
                raise KeysBusy("another process re-wraps the same day")
            self._run("INSERT INTO wrapping_keys VALUES (?, ?)", (target, wrapped))
            sequence = self._bump(before)
        self.kms.raise_counter(sequence)
        return target

    def _rewrap_rows(self, older: list[str], newest: str, ciphers: Mapping[str, AESGCM]) -> int:
        """Move all rows under older generations of a day to its newest, step by step; return how many."""

        def again(kek: str, wrapped: bytes, aad: bytes) -> bytes:
            return wrap(ciphers[newest], unwrap(ciphers[kek], wrapped, aad), aad)

        moved = 0
        for rows in self._persons_under(older):
            moves = [(newest, again(row[4], row[5], person_aad(PersonRef(*row[:3]), row[3])), row) for row in rows]
            with self._transaction(Mode.EXCLUSIVE):
                self._move_persons(moves)
            moved += len(moves)
        under = f"kek IN ({marks(older)})"
        with self._transaction(Mode.READ):
            epochs = self._run(
                f"SELECT domain, owner, epoch, version, kek, deadline_s, wrapped FROM epoch_keys WHERE {under}", older
            )
        for chunk in chunks(epochs, STEP):
            with self._transaction(Mode.EXCLUSIVE):
                self._run_many(
                    f"UPDATE epoch_keys SET kek = ?, wrapped = ? WHERE {_EPOCH} AND version = ? AND kek = ?",
                    [
                        (newest, again(kek, wrapped, epoch_aad(KeyId(*key_id), deadline_s)), *key_id, kek)
                        for *key_id, kek, deadline_s, wrapped in chunk
                    ],
                )
        with self._transaction(Mode.EXCLUSIVE):
            tokens = self._run(f"SELECT version, kek, wrapped FROM token_keys WHERE {under}", older)
            self._run_many(
                "UPDATE token_keys SET kek = ?, wrapped = ? WHERE version = ?",
                [(newest, again(kek, wrapped, token_aad(version)), version) for version, kek, wrapped in tokens],
            )
            small = self._run(f"SELECT name, kek, wrapped FROM secrets WHERE {under}", older)
            self._run_many(
                "UPDATE secrets SET kek = ?, wrapped = ? WHERE name = ?",
                [(newest, again(kek, wrapped, secret_aad(name)), name) for name, kek, wrapped in small],
            )
        return moved + len(epochs) + len(tokens) + len(small)

    def _is_used(self, keks: list[str]) -> bool:
        """Return whether anything is under the generations; inside a transaction."""
        under = f"kek IN ({marks(keks)}) LIMIT 1"
        tables = ("epoch_keys", "token_keys", "secrets")
        return any(self._run(f"SELECT 1 FROM {table} WHERE {under}", keks) for table in tables) or self._has_persons(
            keks
        )

    def _drop_generations(self, keks: Sequence[str]) -> None:
        """Delete wrapping keys under which nothing is left."""
        query = f"SELECT kek, length(wrapped) FROM wrapping_keys WHERE kek IN ({marks(keks)})"
        self._run_many(
            "UPDATE wrapping_keys SET wrapped = ? WHERE kek = ?",
            [(os.urandom(size), kek) for kek, size in self._run(query, keks)],
        )
        self._run(f"DELETE FROM wrapping_keys WHERE kek IN ({marks(keks)})", keks)
        self._ciphers.clear()

    def stale_days(self) -> dict[str, int]:
        """Return days under which something was destroyed before its day → Unix s of the first such destruction."""
        found: dict[str, int] = {}
        with self._transaction(Mode.READ):
            date = today(self._now_s())
            for kek, at_s in self._run("SELECT kek, at_s FROM stale ORDER BY at_s"):
                if day_in(kek) >= date:
                    found.setdefault(day_in(kek).rstrip(), at_s)
        return found

    def _is_lost(self, day: str) -> bool:
        return any(day_in(kms_generation(name)) == day for name in self.lost())

    def lost(self) -> list[str]:
        """Return the KEKs that keys of the store are under and the service lacks."""
        with self._transaction(Mode.READ):
            names = {kms_name(kek) for (kek,) in self._run("SELECT kek FROM wrapping_keys")}
        return sorted(names - set(self.kms.names()))

    # --- upkeep ----------------------------------------------------------------------------------------------

    def rotate_root(self) -> None:
        """Rotate the root of the KMS and take note of it; killed half-way, calling again finishes it."""
        self.kms.rotate_root()
        self._note_root()

    def _note_root(self) -> None:
        with self._transaction(Mode.EXCLUSIVE):
            self._set_meta("root_check", self.kms.check.hex())

    def add_token_key(self) -> TokenKey:
        """Make the token key that a rotation will switch to, or return the one that is waiting for that."""
        with self._transaction(Mode.READ):
            self._warm({FOREVER})
        with self._transaction(Mode.EXCLUSIVE):
            rows = self._run("SELECT version, state, kek, wrapped FROM token_keys ORDER BY version")
            for version, state, kek, wrapped in rows:
                if state == "waiting":
                    return TokenKey(version, unwrap(self._cipher(kek), wrapped, token_aad(version)))
            made = TokenKey(rows[-1][0] + 1, secrets.token_bytes(SECRET_BYTES))
            kek, cipher = self._newest(FOREVER)
            wrapped = wrap(cipher, made.key, token_aad(made.version))
            self._run("INSERT INTO token_keys VALUES (?, ?, ?, ?)", (made.version, "waiting", kek, wrapped))
            return made

    def hold_tokens(self, version: int) -> int:
        """Begin the switch to a waiting token key: `changing` is set, and the sequence moves. Idempotent."""
        with self._transaction(Mode.EXCLUSIVE) as before:
            sequence = before
            if self._token_state(version) != "waiting":
                raise TokensChange(_ROTATED)
            if not self._changing():
                self._set_meta("tokens_changing", "1")
                sequence = self._bump(before)
        self.kms.raise_counter(sequence)
        return sequence

    def switch_tokens(self, version: int) -> int:
        """End the switch: the waiting token key is current, `changing` is off, the sequence moves. Idempotent."""
        with self._transaction(Mode.EXCLUSIVE) as before:
            sequence, state = before, self._token_state(version)
            if state != "current" and not (state == "waiting" and self._changing()):
                raise TokensChange(_ROTATED)
            if state == "waiting":
                self._run("UPDATE token_keys SET state = 'earlier' WHERE state = 'current'")
                self._run("UPDATE token_keys SET state = 'current' WHERE state = 'waiting'")
                self._set_meta("tokens_changing", "0")
                sequence = self._bump(before)
        self.kms.raise_counter(sequence)
        return sequence

    def destroy_token_key(self, version: int) -> None:
        """Delete an older token key that no person is known under any more. Raises ValueError otherwise."""
        with self._transaction(Mode.READ):
            states = dict(self._run("SELECT version, state FROM token_keys"))
        if states.get(version) not in ("earlier", "deleted"):
            raise ValueError("not an older token key")
        if states[version] == "earlier" and self._has_tokens(version):
            raise ValueError("people are still known under this token key")
        with self._transaction(Mode.EXCLUSIVE) as before:
            sequence = before
            rows = self._run("SELECT kek FROM token_keys WHERE version = ? AND state = 'earlier'", (version,))
            if rows:
                self._note_stale([kek for (kek,) in rows], "")
                self._run(
                    "UPDATE token_keys SET state = 'deleted', kek = ?, wrapped = ? WHERE version = ?",
                    (GONE, os.urandom(WRAPPED_BYTES), version),
                )
                sequence = self._bump(before)
        self._settled(sequence)

    def _changing(self) -> bool:
        return self._run("SELECT 1 FROM meta WHERE name = 'tokens_changing' AND value = '1'") != []

    def _token_state(self, version: int) -> str:
        """Return the state of a token key; empty: there is none."""
        rows = self._run("SELECT state FROM token_keys WHERE version = ?", (version,))
        return rows[0][0] if rows else ""

    def _current_token(self) -> int:
        version: int = self._run("SELECT version FROM token_keys WHERE state = 'current'")[0][0]
        return version

    def secret(self, name: str) -> bytes | None:
        """Return a small secret kept beside the keys."""
        with self._transaction(Mode.READ):
            rows = self._run(  # one under a day that was given up has no key any more
                "SELECT kek, wrapped FROM secrets WHERE name = ? AND kek <> ?", (_secret_name(name), GONE)
            )
            return (
                unpadded(unwrap(self._cipher(rows[0][0]), rows[0][1], secret_aad(_secret_name(name)))) if rows else None
            )

    def put_secret(self, name: str, value: bytes, day: str = NEVER) -> None:
        """Keep a small secret; replaces one of the same name. Raises ValueError beyond 1024 bytes."""
        plain, key, wide = padded(value), _secret_name(name), day.ljust(len(FOREVER))
        with self._transaction(Mode.READ):
            absent = self._warm({wide})

        def put() -> None:
            kek, cipher = self._newest(wide)
            wrapped = wrap(cipher, plain, secret_aad(key))
            known = self._run("SELECT name FROM secrets WHERE name = ?", (key,))
            free = known or self._run("SELECT name FROM secrets WHERE kek = ? LIMIT 1", (GONE,))
            if free:
                query = "UPDATE secrets SET name = ?, kek = ?, wrapped = ? WHERE name = ?"
                self._run(query, (key, kek, wrapped, free[0][0]))
            else:
                self._run("INSERT INTO secrets VALUES (?, ?, ?)", (key, kek, wrapped))

        self._written(Mode.EXCLUSIVE, absent, put)

    def drop_secret(self, name: str) -> None:
        """Delete a small secret; idempotent. Where there was one this is a destruction, and moves the sequence."""
        with self._transaction(Mode.EXCLUSIVE) as before:
            sequence = before
            rows = self._run("SELECT kek FROM secrets WHERE name = ?", (_secret_name(name),))
            if rows:
                self._note_stale([kek for (kek,) in rows], "")
                self._run(  # the row waits for another secret
                    "UPDATE secrets SET name = ?, kek = ?, wrapped = ? WHERE name = ?",
                    (os.urandom(SID_BYTES), GONE, os.urandom(_SECRET_WRAPPED_BYTES), _secret_name(name)),
                )
                sequence = self._bump(before)
        self._settled(sequence)

    def status(self, now_s: int) -> list[KeyStatus]:
        """Return the epoch keys, tombstones included, by domain, owner and epoch."""
        with self._transaction(Mode.READ):
            rows = self._run(
                "SELECT domain, owner, epoch, count(*), max(deadline_s), min(kek) FROM epoch_keys "
                "GROUP BY domain, owner, epoch ORDER BY domain, owner, epoch"
            )
        return [
            KeyStatus(domain, owner, epoch, 0, deadline_s, "destroyed")
            if kek == GONE
            else KeyStatus(domain, owner, epoch, versions, deadline_s, "alive" if _alive(deadline_s, now_s) else "due")
            for domain, owner, epoch, versions, deadline_s, kek in rows
        ]

    def catch_up(self) -> None:
        """Raise an outdated store's sequence to the KMS counter, after its destructions were done again."""
        counter = 0
        with suppress(KeysUnusable):  # a counter that is lost is made anew
            counter = self.kms.counter()
        with self._transaction(Mode.EXCLUSIVE) as sequence:
            if sequence < counter:
                self._set_meta("destruction_seq", str(counter))
        self.kms.raise_counter(sequence)

    # --- for the ledger --------------------------------------------------------------------------------------

    def reading(self) -> AbstractContextManager[int]:
        """Return a transaction that reads."""
        return self._transaction(Mode.READ)

    def writing(self) -> AbstractContextManager[int]:
        """Return a transaction that writes."""
        return self._transaction(Mode.SHARE)

    def run(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement inside a transaction, and return its rows."""
        return self._run(query, values)

    # --- below all of them -----------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self, mode: Mode) -> Iterator[int]:
        """Run one transaction, rolled back on any error; gives the destruction sequence at its start."""
        with self._lock:
            try:
                with self._begun(mode):
                    sequence = int(self._run("SELECT value FROM meta WHERE name = 'destruction_seq'")[0][0])
                    if sequence != self._sequence:
                        if sequence < self._sequence:
                            raise KeysUnusable(
                                "the key store went back in time while it was open: it was restored from a backup;"
                                " stop everything and run: streamveil keys reconcile"
                            )
                        self._ciphers.clear()
                        self._sequence = sequence
                    self._ciphers.tick()
                    yield sequence
            except BaseException:
                self._ciphers.clear()  # it may hold a wrapping key that was not written
                raise

    def _cipher(self, kek: str) -> AESGCM:
        """Return the wrapping key of a generation; inside a transaction."""
        cipher = self._ciphers.held.get(kek)
        if cipher is None:
            rows = self._run("SELECT wrapped FROM wrapping_keys WHERE kek = ?", (kek,))
            if not rows:
                raise KeysUnusable(
                    "wrapping key missing; restore the key store from its backup", day=day_in(kek).rstrip()
                )
            cipher = self._ciphers.put(kek, AESGCM(self.kms.unwrap(kms_name(kek), rows[0][0])))
        return cipher

    def _written(self, mode: Mode, absent: Iterable[str], write: Callable[[], _T]) -> _T:
        """Return what `write` returns, called in a transaction; before, the days without a generation are begun."""
        days = set(absent)
        for left in reversed(range(ROUNDS)):
            for day in sorted(days):
                self._begin_day(day)
            try:
                with self._transaction(mode):
                    return write()
            except _NotBegun as error:
                if not left:
                    raise
                days = {error.day}
        raise AssertionError("unreachable")

    def _newest(self, day: str) -> tuple[str, AESGCM]:
        """Return a day's newest generation and its wrapping key; inside a transaction. Raises _NotBegun."""
        kek = self._ciphers.newest.get(day)
        if kek is None:
            found = self._generations(day)
            if not found:
                raise _NotBegun(day)
            kek = self._ciphers.newest[day] = found[-1]
        return kek, self._cipher(kek)

    def _generations(self, day: str) -> list[str]:
        """Return a day's generations, oldest first."""
        rows = self._run("SELECT kek FROM wrapping_keys WHERE kek > ? AND kek < ? ORDER BY kek", _around(day))
        return [kek for (kek,) in rows]

    def _warm(self, days: Iterable[str]) -> list[str]:
        """Hold the newest wrapping key of each day, so that no lock waits for the KMS; return the days without one."""
        absent = []
        for day in sorted(days):
            kek = self._ciphers.newest.get(day)
            if kek is None:
                found = self._generations(day)
                if not found:
                    absent.append(day)
                    continue
                kek = self._ciphers.newest[day] = found[-1]
            self._cipher(kek)
        return absent

    def _begin_day(self, day: str) -> None:
        """Make the first generation of a day, unless another process is faster or destroyed something meanwhile.

        The first after those that the service destroyed: what was there may have been buried before its time, or be
        newer than this store, which a backup brought back.
        """
        with self._transaction(Mode.READ) as before:
            if self._generations(day):
                return
        kek, key = generation(day, self.kms.last_destroyed(day.rstrip()) + 1), secrets.token_bytes(SECRET_BYTES)
        wrapped = self.kms.wrap(kms_name(kek), key)
        with self._transaction(Mode.EXCLUSIVE) as sequence:
            if sequence == before and not self._generations(day):  # so no burial has this KEK on its list
                self._run("INSERT INTO wrapping_keys VALUES (?, ?)", (kek, wrapped))
                self._ciphers.newest[day] = kek
                self._ciphers.put(kek, AESGCM(key))

    def _bump(self, sequence: int) -> int:
        self._set_meta("destruction_seq", str(sequence + 1))
        return sequence + 1

    def _set_meta(self, name: str, value: str) -> None:
        self._run("UPDATE meta SET value = ? WHERE name = ?", (value, name))

    def _settled(self, sequence: int) -> int:
        """Return the sequence of a committed destruction when nothing can undo it."""
        self.kms.raise_counter(sequence)
        self._settle()
        return sequence

    # --- what a database fills in ----------------------------------------------------------------------------

    @abstractmethod
    def _begun(self, mode: Mode) -> AbstractContextManager[None]:
        """Run one transaction: commit, durable, at the end, roll back on any error; translate the database's errors.

        `READ`: every statement sees the same state. `SHARE`, `EXCLUSIVE`: the lock is taken first, and statements see
        what was committed before it was got. Called with `self._lock` held: one transaction at a time.
        """

    @abstractmethod
    def _run(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement inside a transaction, and return its rows; bytes come back as `bytes`."""

    @abstractmethod
    def _run_many(self, query: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run one statement for each row; nothing if there is none."""

    @abstractmethod
    def _now_s(self) -> float:
        """Return the time by the store's clock, Unix s; inside a transaction. On a server it is the server's."""

    @abstractmethod
    def _find_persons(self, owner: str, month: str, tokens: list[bytes]) -> Iterable[tuple[bytes, bytes, str, bytes]]:
        """Return token, sid, generation, wrapped secret of an owner's people of a month, as many as there are."""

    @abstractmethod
    def _find_tokens(self, tokens: list[bytes]) -> list[Row]:
        """Return all rows known by one of the tokens (few), of any owner and month."""

    @abstractmethod
    def _find_sids(self, sids: list[bytes]) -> list[Row]:
        """Return the rows that have one of the sids (up to many thousands)."""

    @abstractmethod
    def _add_persons(self, rows: list[Row], token_version: int) -> Collection[Row]:
        """Add rows, with the version of the token key they are known under; return those that were there already.

        There already: the same owner, token and month. Theirs are committed, and seen by the next statement. Two
        processes that add the same people in another order must not wait for each other.
        """

    @abstractmethod
    def _move_persons(self, moves: list[tuple[str, bytes, Row]]) -> None:
        """Put rows, found by month and sid, under a generation: (generation, wrapped secret, the row as it was).

        Only where the row's generation is before that one (`kek < ?`), for it may have been moved, or have gone, since.
        """

    @abstractmethod
    def _forget_persons(self, rows: Collection[Row]) -> None:
        """Let nothing be left of rows, found by month and sid: neither token, sid nor wrapped secret."""

    @abstractmethod
    def _persons_under(self, keks: list[str]) -> Iterator[list[Row]]:
        """Yield all rows under the generations, about `STEP` at a time, each read in a transaction of its own.

        Not called inside a transaction. Between two, rows may be moved (`_move_persons`) or go; none is added.
        """

    @abstractmethod
    def _sids_of(self, owner: str) -> Iterator[list[bytes]]:
        """Yield the sids of an owner's rows, up to `STEP` at a time, each read in a transaction of its own.

        Not called inside a transaction. Between two, rows may go. None is missed but what is added meanwhile.
        """

    @abstractmethod
    def _bury_persons(self, day: str) -> int:
        """Let nothing be left of all rows under a day, in transactions of their own; return how many there were.

        Where all rows of a month are under days up to this one, the month's table or partition goes. Idempotent.
        """

    @abstractmethod
    def _has_persons(self, keks: list[str]) -> bool:
        """Return whether a row is under the generations; inside a transaction."""

    @abstractmethod
    def _has_tokens(self, version: int) -> bool:
        """Return whether a row was added under a version of the token key. Not called inside a transaction."""

    @abstractmethod
    def _settle(self) -> None:
        """Let no file of the database keep what was overwritten or deleted, as far as the database can tell.

        Not called inside a transaction. Raises KeysBusy, with what to do, if it must be tried again.
        """

    @abstractmethod
    def _close(self) -> None:
        """Close the connection; idempotent."""


def first_rows(kms: Kms, store_id: str) -> list[tuple[str, tuple[Any, ...]]]:
    """Return the statements that fill a new store: its name, and the first token key under the first generation."""
    day_key, token_key, kek = (
        secrets.token_bytes(SECRET_BYTES),
        secrets.token_bytes(SECRET_BYTES),
        generation(FOREVER, 1),
    )
    meta = {
        "schema": str(SCHEMA_VERSION),
        "store_id": store_id,
        "root_check": kms.check.hex(),
        "destruction_seq": "0",
        "tokens_changing": "0",
    }
    wrapped = wrap(AESGCM(day_key), token_key, token_aad(1))
    return [
        *(("INSERT INTO meta VALUES (?, ?)", item) for item in meta.items()),
        ("INSERT INTO wrapping_keys VALUES (?, ?)", (kek, kms.wrap(NEVER, day_key))),
        ("INSERT INTO token_keys VALUES (?, ?, ?, ?)", (1, "current", kek, wrapped)),
    ]


def check_version(meta: Mapping[str, Any]) -> None:
    """Raise KeysUnusable if a `meta` table is not of a store that this version understands."""
    if "schema" not in meta:
        raise KeysUnusable("this is not a key store; check where the configuration points")
    if str(meta["schema"]) != str(SCHEMA_VERSION):
        raise KeysUnusable(
            "the key store was made by another version of the program; use that one", schema=meta["schema"]
        )


def chunks(values: Sequence[_T], size: int = CHUNK) -> Iterator[Sequence[_T]]:
    """Return the values in pieces of at most `size`."""
    return (values[start : start + size] for start in range(0, len(values), size))


def marks(values: Sequence[Any]) -> str:
    """Return a placeholder for each value."""
    return ",".join("?" * len(values))


def day_of_text(text: str) -> str | None:
    """Return the day, if the text is one."""
    try:
        return day_in(kms_generation(text)) if text[4:8:3] == "--" and len(text) == len(FOREVER) else None
    except ValueError:
        return None


def _around(day: str) -> tuple[str, str]:
    """Return what all generations of a day sort between: the dot, and the character after it."""
    return f"{day}.", f"{day}/"


def _alive(deadline_s: int | None, now_s: int) -> bool:
    return deadline_s is None or deadline_s > now_s


def _count(seals: int) -> str:
    return f"{seals:010d}"


def _epoch_day(ref: EpochRef, deadline_s: int | None) -> str:
    return AT_WILL if ref.domain == Domain.HELD.value else day_of(deadline_s)


def _secret_name(name: str) -> bytes:
    """Return what a row says of a secret's name: of one width, so that the row can be used again."""
    return blake2b(name.encode(), digest_size=SID_BYTES).digest()
