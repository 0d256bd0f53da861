"""The key management service of a Vault or OpenBao server: engine transit for the keys, key-value for what must last.

    TRANSIT/keys/PREFIX STORE-DAY[-GENERATION]   a key-encryption key; it never leaves the server
    KV/data/PREFIX STORE                         the entry of the store: what it is known by, the destruction counter,
                                                 and which keys were destroyed

Rules of this file:
- Nothing is made, wrapped or deleted on a guess: an answer that is not the server's own JSON counts as none.
- A key is made by name, never by an `encrypt` that happens to lack one, and what was wrapped is opened once before it
  is given out.
- One operation takes at most `timeout_s`, with all its requests and repeats; a request that hangs leaves time for
  another. What is safe to repeat is repeated with jitter; a login is not, once it may have arrived. After `BREAK_AFTER`
  failures in a row nothing is sent for `BREAK_S`, then one request. What was refused is refused for `REFUSED_S` without
  asking.
- `KmsUnavailable`: no answer, or one to wait for. `KmsRefuses`: an answer, and it is no. Both pass by themselves:
  token, secret id and certificate authority are read anew, a login is repeated.
- No token, key, ciphertext or plaintext stands in an error; one names the service and the key.
"""

import base64
import hashlib
import hmac
import os
import re
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx
import msgspec
import pybreaker
import tenacity

from schemas.errors import KeysUnusable, KmsRefuses, KmsUnavailable
from schemas.sealed import framed
from streams.config import Vault
from streams.keys.kms_local import check_private
from streams.keys.store import NEVER

BREAK_AFTER = 5
"""Failed requests in a row after which none is sent for a while."""
BREAK_S = 5.0
REFUSED_S = 3.0
"""So long a refusal is remembered."""
RELOGIN_S = 10.0
"""So long a new login is not repeated because of a refusal."""
PLAINTEXT_BYTES = 4096
ANSWER_BYTES = 4 * 1024 * 1024
ATTEMPTS = 4
RACES = 20
"""How often the entry of a store is read anew because another process was quicker to write."""
TOMBSTONES = 64
"""From so many on, those of days that are long over are kept as one date."""
OVER_DAYS = 31
REFUSALS = 256

_NAME = re.compile(rf"([0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}|{NEVER})(?:\.([2-9]|[1-9][0-9]{{1,3}}))?")
_THERE = re.compile(_NAME.pattern.replace(r"\.", "-", 1))  # the same on the server
_STORE_ID = re.compile(r"[0-9a-f]{32}")
_CIPHERTEXT = re.compile(rb"vault:v[0-9]{1,9}:[A-Za-z0-9+/]+={0,2}")
_SECRET = re.compile(r"[!-~]{1,4096}")
_AS_MADE = {"type": "aes256-gcm96", "exportable": False, "derived": False, "allow_plaintext_backup": False}
_REPEATED = frozenset({"connect", "timeout", "broken", "failing"})


class _Answer(NamedTuple):
    """What the server said: status 2xx, 400, 403, 404 or another refusal, and its JSON."""

    status: int
    body: dict[str, Any]

    @property
    def done(self) -> bool:
        return self.status < 300

    @property
    def missing(self) -> bool:
        """Whether the server knows the place, and nothing is there; an unknown place has an error to it."""
        return self.status == 404 and not self.body.get("errors")

    def says(self, words: str) -> bool:
        """Return whether an error of it has these words."""
        errors = self.body.get("errors")
        return isinstance(errors, list) and any(words in error for error in errors if isinstance(error, str))


class _Login(NamedTuple):
    """A token of our own, and when it is to be renewed and has ended, by the monotonic clock."""

    token: str
    at: float
    renew_at: float
    ends_at: float

    def __repr__(self) -> str:
        return "_Login()"


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The entry of a store. `destroyed`: day → highest generation destroyed; up to the day `through` all are."""

    format: int
    check: str
    counter: int
    destroyed: dict[str, int]
    through: str

    def gone(self, day: str, generation: int) -> bool:
        return generation <= self.destroyed.get(day, 0) or (day != NEVER and day <= self.through)


class _SteadyStorage(pybreaker.CircuitMemoryStorage):
    """The state of the circuit breaker, in which a clock that is set back keeps nothing open."""

    _at: float | None = None

    @property
    def opened_at(self) -> datetime | None:
        return None if self._at is None else datetime.now(UTC) - timedelta(seconds=time.monotonic() - self._at)

    @opened_at.setter
    def opened_at(self, _: datetime) -> None:
        self._at = time.monotonic()


class _Client:
    """HTTP to one server: who we are to it, repeats, and when not to ask. Threads take turns."""

    def __init__(self, settings: Vault) -> None:
        self.calls = 0
        self._settings = settings
        self._lock = threading.Lock()
        self._http: httpx.Client | None = None
        self._login: _Login | None = None
        self._login_refused_at = self._asked_to_wait_until = float("-inf")
        self._deadline = 0.0
        self._breaker = pybreaker.CircuitBreaker(
            BREAK_AFTER, BREAK_S, state_storage=_SteadyStorage(pybreaker.STATE_CLOSED), throw_new_error_on_trip=False
        )

    @contextmanager
    def _operation(self) -> Iterator[None]:
        """Be the one operation under way, for at most `timeout_s`."""
        deadline = time.monotonic() + self._settings.timeout_s
        if not self._lock.acquire(timeout=self._settings.timeout_s):
            raise self._unavailable("busy")
        try:
            self._deadline = deadline
            yield
        finally:
            self._lock.release()

    def _ask(self, method: str, path: str, body: object = None) -> _Answer:
        """Send a request that is safe to repeat. Raises KmsUnavailable; KmsRefuses if we are nobody to the server."""
        token = self._token()
        answer = self._repeated(_REPEATED, method, path, body, token)
        if answer.status == 403 and (newer := self._newer_token(token)):
            answer = self._repeated(_REPEATED, method, path, body, newer)
        return answer

    def _repeated(self, causes: frozenset[str], method: str, path: str, body: object, token: str | None) -> _Answer:
        """Send a request, again after failures of these causes, as long as the operation may take."""
        if time.monotonic() < self._asked_to_wait_until:
            raise self._unavailable("throttled")
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(
                lambda error: (
                    isinstance(error, KmsUnavailable)
                    and error.where.get("cause") in causes
                    and self._breaker.current_state == pybreaker.STATE_CLOSED
                )
            ),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=0.5),
            stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_before_delay(self._left_s()),
            reraise=True,
        )
        try:
            answer: _Answer = retrying(self._breaker.call, self._send, method, path, body, token)
        except pybreaker.CircuitBreakerError:
            raise self._unavailable("not_asked") from None
        return answer

    def _send(self, method: str, path: str, body: object, token: str | None) -> _Answer:
        """Send a request once."""
        headers = {"X-Vault-Request": "true"}
        if token is not None:
            headers["X-Vault-Token"] = token
        if self._settings.namespace is not None:
            headers["X-Vault-Namespace"] = self._settings.namespace
        client, left_s = self._connected(), self._left_s()
        limit = httpx.Timeout(left_s / 2, connect=left_s / 4)  # connecting is twice that: TCP, TLS
        self.calls += 1
        content = bytearray()
        try:
            with client.stream(method, f"/v1/{path}", json=body, headers=headers, timeout=limit) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) > ANSWER_BYTES:
                        raise self._unavailable("answer")
                    self._left_s()
        except httpx.HTTPError as error:
            self._disconnect()  # names and certificates are looked at anew
            raise self._unavailable(_cause(error)) from None
        return self._understood(response, bytes(content))

    def _understood(self, response: httpx.Response, content: bytes) -> _Answer:
        """Return an answer that is one: not of somebody on the way, nor of a server that cannot answer now."""
        status = response.status_code
        if status == 429:
            wait = response.headers.get("retry-after", "")
            self._asked_to_wait_until = time.monotonic() + (
                min(int(wait), 30) if re.fullmatch("[0-9]{1,4}", wait) else 1
            )
            raise self._unavailable("throttled")
        if status == 503:
            raise self._unavailable("sealed")
        if status >= 500 or status in (412, 472, 473):
            raise self._unavailable("failing", status)
        if 300 <= status < 400:  # whoever follows shows the token to another host
            raise self._unavailable("redirect", status)
        try:
            body = msgspec.json.decode(content) if content or status != 204 else {}
        except msgspec.DecodeError:
            body = None
        if not isinstance(body, dict):
            raise self._unavailable("answer", status)
        return _Answer(status, body)

    # --- who we are ---------------------------------------------------------------------------------------------

    def _token(self) -> str:
        """Return the token that is valid now, as far as we know."""
        if self._settings.token_path is not None:
            return _read_secret(self._settings.token_path)
        now, login = time.monotonic(), self._login
        if login is not None and now < login.renew_at:
            return login.token
        if login is not None and now < login.ends_at:
            self._login = self._renewed(login)
        if self._login is None or time.monotonic() >= self._login.renew_at:  # it has ended, or was not made to last
            self._login = self._new_login()
        return self._login.token

    def _renewed(self, login: _Login) -> _Login | None:
        """Return the login with a new life; None: it cannot be renewed, which a server may call an error of its own."""
        try:
            answer = self._repeated(_REPEATED - {"failing"}, "POST", "auth/token/renew-self", {}, login.token)
        except KmsUnavailable as error:
            if error.where.get("cause") == "failing":
                return None
            raise
        return self._logged_in(answer) if answer.done else None

    def _newer_token(self, refused: str) -> str | None:
        """Return another token after one was refused, if there can be one now."""
        if self._settings.token_path is None:
            if self._login is None or time.monotonic() < self._login.at + RELOGIN_S:
                return None
            self._login = None
        token = self._token()
        return token if token != refused else None

    def _new_login(self) -> _Login:
        secret_path = self._settings.secret_id_path
        if secret_path is None:
            raise ValueError("a configuration has a token or a secret id")
        if time.monotonic() < self._login_refused_at + REFUSED_S:
            raise self._login_refused()
        who = {"role_id": self._settings.role_id, "secret_id": _read_secret(secret_path)}
        answer = self._repeated(frozenset({"connect"}), "POST", "auth/approle/login", who, None)
        if not answer.done:
            self._login_refused_at = time.monotonic()
            raise self._login_refused()
        return self._logged_in(answer)

    def _login_refused(self) -> KmsRefuses:
        return KmsRefuses(
            "the key management service refuses the login; check role_id and secret_id_file",
            service=self._settings.address,
        )

    def _logged_in(self, answer: _Answer) -> _Login:
        match answer.body.get("auth"):
            case {"client_token": str(token), "lease_duration": int(lease_s)} if _SECRET.fullmatch(token):
                now = time.monotonic()
                life_s = max(lease_s, 1)
                return _Login(token, now, now + life_s * 2 / 3, now + life_s)
        raise self._unavailable("answer")

    # --- the connection -----------------------------------------------------------------------------------------

    def _connected(self) -> httpx.Client:
        if self._http is None:
            path = self._settings.ca_path
            try:
                context = ssl.create_default_context(cafile=path)
            except OSError:
                raise KmsUnavailable(
                    "the file of the certificate authority cannot be read, or holds none", file=str(path)
                ) from None
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            self._http = httpx.Client(
                base_url=self._settings.address,
                verify=context,
                follow_redirects=False,
                trust_env=False,  # no proxy sees the token
            )
        return self._http

    def _disconnect(self) -> None:
        client, self._http = self._http, None
        if client is not None:
            client.close()

    def _left_s(self) -> float:
        """Return how long the operation may still take. Raises KmsUnavailable if that is over."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise self._unavailable("timeout")
        return left_s

    def _unavailable(self, cause: str, status: int | None = None) -> KmsUnavailable:
        where = {"service": self._settings.address, "cause": cause}
        return KmsUnavailable(**where) if status is None else KmsUnavailable(**where, status=status)

    def close(self) -> None:
        """Give a token of our own back, if the server answers, and the connection; idempotent."""
        login, self._login = self._login, None
        with suppress(KmsUnavailable, KmsRefuses):
            if login is not None and not self._breaker.fail_counter:
                with self._operation():
                    self._repeated(frozenset(), "POST", "auth/token/revoke-self", {}, login.token)
        self._disconnect()


class VaultKms(_Client):
    """One store's KEKs and counter on a server; whatever blocks does so for at most `timeout_s`.

    `calls` counts requests. `waiting_period_s` is 0: a deleted key is gone from the server, if not from its backups.
    """

    waiting_period_s = 0
    has_root = False

    def __init__(self, settings: Vault, store_id: str, clock: Callable[[], float] = time.time) -> None:
        """Take what names the store; `create` and `open` return one that can be used."""
        if not _STORE_ID.fullmatch(store_id):
            raise ValueError("not a store id")
        super().__init__(settings)
        self.check = b""
        self._clock = clock
        self._store_id = store_id
        self._ours = f"{settings.prefix}{store_id}"
        self._entry_path = f"{settings.counter_mount}/data/{self._ours}"
        self._refusals: dict[tuple[object, ...], tuple[float, KmsRefuses]] = {}

    def __repr__(self) -> str:
        return f"VaultKms({self._store_id})"

    @classmethod
    def create(cls, settings: Vault, store_id: str, clock: Callable[[], float] = time.time) -> Self:
        """Make the entry of a new key store.

        Raises KeysUnusable if there is one already or its engine is not of version 2; KmsUnavailable; KmsRefuses.
        """
        kms = cls(settings, store_id, clock)
        with kms._opening():
            kms._names()  # whether the engine is there and ours to use
            kms._found()
        return kms

    @classmethod
    def open(cls, settings: Vault, store_id: str, clock: Callable[[], float] = time.time) -> Self:
        """Return the service of an existing key store. Raises KeysUnusable if it does not know it; as `create`."""
        kms = cls(settings, store_id, clock)
        with kms._opening():
            pass
        return kms

    def trusts(self, check: bytes) -> bool:
        """Return whether `check` names the entry of this store, and the mounts and prefix it was made with."""
        return hmac.compare_digest(check, self.check)

    def wrap(self, name: str, plaintext: bytes) -> bytes:
        """Return the plaintext (at most 4096 bytes) wrapped under a KEK, which is made, durable, if there is none.

        Raises KmsRefuses if it was destroyed, or is not as we make them; KmsUnavailable.
        """
        if len(plaintext) > PLAINTEXT_BYTES:
            raise ValueError("too much to wrap")
        _parsed(name)
        with self._asking("wrap", name):
            self._refuse_destroyed(name)
            key = self._key(name)
            if key is None:
                self._done("make", self._ask("POST", self._key_path(name), {"type": _AS_MADE["type"]}), key=name)
                try:
                    self._refuse_destroyed(name)
                except KmsRefuses:  # meanwhile
                    self._delete(name)
                    raise
                key = self._key(name)
            if key is None or any(key.get(trait) != value for trait, value in _AS_MADE.items()):
                raise self._refuses("the key is not as Streamveil makes them; who changed it?", key=name)
            given = {"plaintext": _text(plaintext), "associated_data": self._bound(name)}
            wrapped = self._field("ciphertext", "wrap", name, f"encrypt/{self._transit(name)}", given).encode()
            if self._unwrapped(name, wrapped) != plaintext:
                raise self._unavailable("answer")
            return wrapped

    def unwrap(self, name: str, wrapped: bytes) -> bytes:
        """Return what was wrapped. Raises KmsRefuses if the KEK is missing, or is not the one; KmsUnavailable."""
        _parsed(name)
        with self._asking("unwrap", name, wrapped):
            return self._unwrapped(name, wrapped)

    def destroy(self, name: str) -> None:
        """Delete a KEK, after noting that it is never to be made again; idempotent. Raises KmsUnavailable, KmsRefuses.

        On return the server has said that there is no such key.
        """
        day, generation = _parsed(name)
        with self._operation():
            self._change(lambda entry: self._buried(entry, day, generation))
            self._delete(name)

    def names(self) -> list[str]:
        """Return the names of the KEKs there are, by day and generation. Raises KmsUnavailable, KmsRefuses."""
        with self._operation():
            return self._names()

    def last_destroyed(self, day: str) -> int:
        """Return the highest generation of a day that was destroyed; 0: none, or it was long over then.

        Raises KmsUnavailable, KmsRefuses.
        """
        with self._operation():
            return self._entry()[0].destroyed.get(day, 0)

    def rotate_root(self) -> None:
        """Raise KeysUnusable: what the KEKs are wrapped by is the server's own, and rotated there."""
        raise KeysUnusable(
            "the root of this key management service is the server's own: rotate it there (vault operator rotate,"
            " bao operator rotate), and the rest here: streamveil keys rotate wrapping token"
        )

    def counter(self) -> int:
        """Return the destruction counter. Raises KmsUnavailable, KmsRefuses."""
        with self._operation():
            return self._entry()[0].counter

    def raise_counter(self, value: int) -> None:
        """Raise the counter to at least `value`. Raises KmsUnavailable, KmsRefuses."""
        with self._operation():
            self._change(lambda entry: msgspec.structs.replace(entry, counter=max(entry.counter, value)))

    # --- keys ---------------------------------------------------------------------------------------------------

    def _transit(self, name: str) -> str:
        """Return the name of a KEK on the server."""
        return f"{self._ours}-{name.replace('.', '-')}"

    def _key_path(self, name: str) -> str:
        return f"{self._settings.mount}/keys/{self._transit(name)}"

    def _bound(self, name: str) -> str:
        """Return what binds a ciphertext to the store and the name of its KEK, whatever the name on the server."""
        return _text(framed(b"kek", self._store_id.encode(), name.encode()))

    def _key(self, name: str) -> dict[str, Any] | None:
        """Return what the server says about a KEK; None: that there is none."""
        answer = self._ask("GET", self._key_path(name))
        if answer.missing:
            return None
        self._done("read", answer, key=name)
        key = answer.body.get("data")
        if not isinstance(key, dict):
            raise self._unavailable("answer")
        return key

    def _names(self) -> list[str]:
        answer = self._ask("LIST", f"{self._settings.mount}/keys")
        if answer.missing:
            return []
        self._done("list", answer)
        head = f"{self._ours}-"
        match answer.body.get("data"):
            case {"keys": [*keys]}:
                ours = (_THERE.fullmatch(key.removeprefix(head)) for key in keys if str(key).startswith(head))
                found = sorted((each[1] == NEVER, each[1], int(each[2] or 1)) for each in ours if each)
                return [day if number == 1 else f"{day}.{number}" for _, day, number in found]
        raise self._unavailable("answer")

    def _unwrapped(self, name: str, wrapped: bytes) -> bytes:
        if not _CIPHERTEXT.fullmatch(wrapped):
            raise self._refuses("what is to be opened was not wrapped by such a service", key=name)
        given = {"ciphertext": wrapped.decode(), "associated_data": self._bound(name)}
        opened = self._field("plaintext", "unwrap", name, f"decrypt/{self._transit(name)}", given)
        try:
            return base64.b64decode(opened, validate=True)
        except ValueError:
            raise self._unavailable("answer") from None

    def _delete(self, name: str) -> None:
        """Delete a key, and see that it is gone."""
        if self._key(name) is None:
            return
        answers = (
            self._ask("POST", f"{self._key_path(name)}/config", {"deletion_allowed": True}),
            self._ask("DELETE", self._key_path(name)),
        )
        if self._key(name) is not None:
            for answer in answers:
                self._done("destroy", answer, key=name)
            raise self._refuses("the key is still there, or there again; who made it?", key=name)

    def _field(self, field: str, what: str, name: str, path: str, given: dict[str, str]) -> str:
        """Return one text of the transit engine's answer."""
        answer = self._ask("POST", f"{self._settings.mount}/{path}", given)
        self._done(what, answer, key=name)
        data = answer.body.get("data")
        if isinstance(data, dict) and isinstance(text := data.get(field), str):
            return text
        raise self._unavailable("answer")

    # --- the entry of the store ---------------------------------------------------------------------------------

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """Do what comes first, then see by what the store is known here; if that fails nothing stays open."""
        try:
            with self._operation():
                yield
                entry = self._read_entry()
            if entry is None:
                raise KeysUnusable(
                    "the key management service does not know this store: check address, namespace, counter_mount and"
                    " prefix in [vault], or have the server restored",
                    service=self._settings.address,
                    store=self._store_id,
                )
        except BaseException:
            self.close()
            raise
        place = (entry[0].check, self._settings.mount, self._settings.counter_mount, self._ours)
        self.check = hashlib.blake2b(framed(*(part.encode() for part in place)), digest_size=16).digest()

    def _found(self) -> None:
        """Make the entry of a new store."""
        new = _Entry(1, secrets.token_hex(16), 0, {}, "")
        if self._write_entry(new, 0):
            return
        found = self._read_entry()
        if found is None or found[0].check != new.check:  # else it was written by a request that was repeated
            raise KeysUnusable(
                "the key management service has an entry of this store already; nothing was made",
                service=self._settings.address,
                store=self._store_id,
            )

    def _entry(self) -> tuple[_Entry, int]:
        """Return the entry and its version. Raises KmsRefuses if it is gone."""
        found = self._read_entry()
        if found is None:
            raise self._refuses("the entry of this store is gone; have the server restored", store=self._store_id)
        return found

    def _read_entry(self) -> tuple[_Entry, int] | None:
        answer = self._ask("GET", self._entry_path)
        if answer.missing:
            return None
        self._done("read", answer, store=self._store_id)
        match answer.body.get("data"):
            case {"data": {"format": 1} as entry, "metadata": {"version": int(version)}}:
                with suppress(msgspec.ValidationError):
                    return msgspec.convert(entry, _Entry), version
        raise self._refuses("the entry of this store is not as it was written; who changed it?", store=self._store_id)

    def _write_entry(self, entry: _Entry, version: int) -> bool:
        """Write the entry over that version of it; False: another process was quicker."""
        body = {"options": {"cas": version}, "data": msgspec.to_builtins(entry)}
        answer = self._ask("POST", self._entry_path, body)
        if answer.status == 400 and answer.says("check-and-set"):
            return False
        self._done("write", answer, store=self._store_id)
        match answer.body.get("data"):
            case {"version": int()}:
                return True
        raise KeysUnusable(
            "[vault] counter_mount must be a key-value engine of version 2", service=self._settings.address
        )

    def _change(self, change: Callable[[_Entry], _Entry]) -> None:
        """Change the entry, whoever else does so too."""
        for _ in range(RACES):
            entry, version = self._entry()
            changed = change(entry)
            if changed == entry or self._write_entry(changed, version):
                return
        raise self._unavailable("busy")

    def _buried(self, entry: _Entry, day: str, generation: int) -> _Entry:
        """Return the entry after a key was destroyed.

        Days that are over by more than a month, and than which no key is older, are kept as one date: a store buries
        its days in their order.
        """
        if entry.gone(day, generation):
            return entry
        destroyed, through = {**entry.destroyed, day: generation}, entry.through
        if len(destroyed) > TOMBSTONES:
            past = datetime.fromtimestamp(self._clock(), UTC) - timedelta(days=OVER_DAYS)
            end = min([past.date().isoformat(), *(name[:10] for name in self._names())])
            through = max([through, *(day for day in destroyed if day < end)])
            destroyed = {day: highest for day, highest in destroyed.items() if day > through}
        return msgspec.structs.replace(entry, destroyed=destroyed, through=through)

    # --- what is refused ----------------------------------------------------------------------------------------

    @contextmanager
    def _asking(self, *what: object) -> Iterator[None]:
        """Do an operation, unless it was refused a moment ago."""
        until, refusal = self._refusals.get(what, (0.0, None))
        if refusal is not None and time.monotonic() < until:
            raise KmsRefuses(refusal.message, **refusal.where)
        try:
            with self._operation():
                yield
        except KmsRefuses as error:
            if len(self._refusals) >= REFUSALS:
                self._refusals.clear()
            self._refusals[what] = (time.monotonic() + REFUSED_S, KmsRefuses(error.message, **error.where))
            raise

    def _done(self, what: str, answer: _Answer, **where: str) -> None:
        """Raise KmsRefuses if that was refused."""
        if answer.done:
            return
        if answer.status == 403:
            message = f"the key management service forbids to {what}; check token and policy"
        else:
            message = f"the key management service refuses to {what}; is the key, or the engine, there?"
        raise KmsRefuses(message, service=self._settings.address, status=answer.status, **where)

    def _refuse_destroyed(self, name: str) -> None:
        if self._entry()[0].gone(*_parsed(name)):
            raise self._refuses("the key was destroyed, and is not made again", key=name)

    def _refuses(self, message: str, **where: str) -> KmsRefuses:
        return KmsRefuses(message, service=self._settings.address, **where)


def _parsed(name: str) -> tuple[str, int]:
    """Return the day and the generation of a KEK's name."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError("not the name of a key-encryption key")
    return found[1], int(found[2] or 1)


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _read_secret(path: Path) -> str:
    """Return the token or secret id in a file that is ours alone. Raises KmsRefuses: it may come back."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            check_private(os.fstat(descriptor), path, "600")
            text = file.read(8192).strip().decode()
    except KeysUnusable as error:
        raise KmsRefuses(error.message, file=str(path)) from None
    except (OSError, UnicodeDecodeError):
        raise KmsRefuses("the file of the token or secret id is missing or cannot be read", file=str(path)) from None
    if not _SECRET.fullmatch(text):
        raise KmsRefuses("the file of the token or secret id holds something else", file=str(path))
    return text


def _cause(error: BaseException | None) -> str:
    """Return in one word why there was no answer."""
    if isinstance(error, httpx.ConnectError):
        deeper: BaseException | None = error
        while deeper is not None:
            if isinstance(deeper, ssl.SSLError):
                return "tls"
            deeper = deeper.__cause__ or deeper.__context__
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return "connect"
    return "timeout" if isinstance(error, httpx.TimeoutException) else "broken"
