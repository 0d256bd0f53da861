"""Sealed values: published vectors for the very calls we make, the framing of keys and AAD, what does not open."""

import os
import re
from base64 import b64decode, b64encode

import orjson
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec.structs import replace

from processors.keyring import EpochKey, EpochRef, KeyRing, PersonRef, PersonSecret
from processors.plan import Planner
from processors.seal import Entropy, Job, Sealer, seal_each
from schemas import sealed as grammar
from schemas.sealed import (
    AESGCM,
    KeyId,
    aad_head,
    framed,
    hkdf,
    key_info,
    open_box,
    pad,
    part_head,
    record_key,
    split_envelope,
    take_apart,
    unpad,
)
from tests.support.records import (
    DEFAULT_POLICY,
    NOW_S,
    OTHER,
    PERSON,
    SEED,
    open_value,
    policy_of,
    reply,
    run,
    sms_cdr,
    sms_request,
    voice_cdr,
)

# --- published vectors --------------------------------------------------------------------------------------

LONG_KEY = "feffe9928665731c6d6a8f9467308308" * 2
LONG_TEXT = (
    "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
    "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
)
GCM_AES_256 = {  # McGrew and Viega, The Galois/Counter Mode of Operation, test cases 13 to 16 (96-bit IV)
    13: ("00" * 32, "00" * 12, "", "", "", "530f8afbc74536b9a963b4f1c4cb738b"),
    14: (
        "00" * 32, "00" * 12, "00" * 16, "",
        "cea7403d4d606b6e074ec5d3baf39d18", "d0d1c8a799996bf0265b98b5d48ab919",
    ),
    15: (
        LONG_KEY, "cafebabefacedbaddecaf888", LONG_TEXT + "1aafd255", "",
        ("522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
         "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662898015ad"),
        "b094dac5d93471bdec1a502270e3cc6c",
    ),
    16: (
        LONG_KEY, "cafebabefacedbaddecaf888", LONG_TEXT, "feedfacedeadbeeffeedfacedeadbeefabaddad2",
        ("522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
         "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"),
        "76fc6ece0f4e1768cddf8853bb2d551b",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GCM_AES_256)
def test_aes_256_gcm_gives_the_published_bytes(case):
    key, nonce, text, aad, ciphertext, tag = map(bytes.fromhex, GCM_AES_256[case])
    cipher = AESGCM(key)
    assert cipher.encrypt(nonce, text, aad) == ciphertext + tag
    assert cipher.decrypt(nonce, ciphertext + tag, aad) == text
    with pytest.raises(InvalidTag):
        cipher.decrypt(nonce, ciphertext + tag, aad + b"\0")


HKDF_SHA_256 = {  # RFC 5869, appendix A.1 to A.3
    1: (
        "0b" * 22, bytes(range(13)).hex(), bytes(range(0xF0, 0xFA)).hex(),
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    2: (
        bytes(range(0x50)).hex(), bytes(range(0x60, 0xB0)).hex(), bytes(range(0xB0, 0x100)).hex(),
        ("b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
         "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87"),
    ),
    3: (
        "0b" * 22, "", "",
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HKDF_SHA_256)
def test_hkdf_sha_256_gives_the_published_bytes(case):
    secret, salt, info, output = map(bytes.fromhex, HKDF_SHA_256[case])
    assert HKDF(SHA256(), len(output), salt or None, info).derive(secret) == output
    assert salt or hkdf(secret, info) == output[:32]  # ours takes no salt


def test_our_hkdf_is_openssl_s():
    for size in (0, 1, 32, 63, 64, 65, 100, 1000):
        for info_size in (0, 1, 50, 64, 200):
            secret, info = os.urandom(size), os.urandom(info_size)
            assert hkdf(secret, info) == HKDF(SHA256(), 32, None, info).derive(secret)


# --- keys and frames ----------------------------------------------------------------------------------------

EPOCH_KEY, SECRET = bytes(range(32)), bytes(range(32, 64))


def frame(*texts):
    return b"".join(len(text).to_bytes(4, "big") + text for text in map(str.encode, texts))


def test_the_record_key_is_hkdf_of_epoch_key_and_secret_over_domain_owner_account_epoch_version():
    # Given the key as the grammar says it
    info = frame("pii", "platform", "acme", "2026-11", "12")
    key = HKDF(SHA256(), 32, None, info).derive(EPOCH_KEY + SECRET)
    # When our record key encrypts
    key_id = KeyId("pii", "platform", "2026-11", 12)
    cipher = record_key(EPOCH_KEY, SECRET, key_info(key_id, "acme"))
    # Then it is under that key, for good
    assert cipher.encrypt(bytes(12), b"text", b"aad") == AESGCM(key).encrypt(bytes(12), b"text", b"aad")
    assert key_info(key_id, "acme") == info
    assert key.hex() == "1f294dccf20b1eaf10d95933d1c41841e3bb36357f35f6f9f61127d06fb936c1"


def test_any_other_key_secret_domain_owner_account_epoch_or_version_is_another_record_key():
    base = (EPOCH_KEY, SECRET, "pii", "platform", "acme", "2026-11", 1)
    others = (SECRET, EPOCH_KEY, "content", "acme", "platform", "2026-12", 2)
    seen = set()
    for at in range(-1, len(base)):
        key, secret, domain, owner, name, epoch, version = (
            (*base[:at], others[at], *base[at + 1 :]) if at >= 0 else base
        )
        cipher = record_key(key, secret, key_info(KeyId(domain, owner, epoch, version), name))
        seen.add(cipher.encrypt(bytes(12), bytes(16), None))
    assert len(seen) == len(base) + 1


def test_frames_keep_lists_of_texts_apart():
    lists = [(), (b"",), (b"", b""), (b"ab",), (b"a", b"b"), (b"", b"ab"), (b"ab", b""), (b"\0\0\0\1a",)]
    assert len({framed(*parts) for parts in lists}) == len(lists)
    assert framed(b"a", b"") == b"\0\0\0\1a\0\0\0\0"


def test_padding_is_a_multiple_of_32_bytes_and_never_nothing():
    for size in range(100):
        text = b"\x80" * (size % 3) + b"x" * (size - size % 3)
        assert len(pad(text)) % 32 == 0
        assert len(pad(text)) - 32 <= size < len(pad(text))
        assert unpad(pad(text)) == text
    assert unpad(pad(b"a\x80\0\0")) == b"a\x80\0\0"


@pytest.mark.parametrize(
    "padded", [b"", b"\0", bytes(32), b"x" * 32, b"x\x80" + bytes(32), b"\x80" + bytes(32), b"x\x80\0\x01"]
)
def test_what_is_not_our_padding_is_refused(padded):
    with pytest.raises(ValueError, match="bad padding"):
        unpad(padded)


def test_a_key_id_is_read_as_it_is_written():
    key_id = KeyId("content", "acme.x-1", "2026-11-21T14", 3)
    assert str(key_id) == "content/acme.x-1/2026-11-21T14/3"
    assert KeyId.parse(str(key_id)) == key_id


@pytest.mark.parametrize(
    "text", ["", "a", "a/b/c", "a/b/c/d", "a/b/c/-1", "a/b/c/1/2", "/b/c/1", "a//c/1", "a/b//1", "a/b/c/²"]
)
def test_what_is_no_key_id_is_refused(text):
    with pytest.raises(ValueError):
        KeyId.parse(text)


# --- the grammar, read by somebody else ---------------------------------------------------------------------


def opened_by_hand(value, stream, epoch_key, secrets):
    """Open a value with JSON, base64, HMAC and a GCM decryptor only, following the grammar to the letter."""
    fields = orjson.loads(value)
    parts = fields["sealed"]
    boxes = [b64decode(part.pop("box"), validate=True) for part in parts]
    envelope = orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)
    opened = {}
    for part, box in zip(parts, boxes, strict=True):
        domain, owner, epoch, version = part["key"].split("/")
        name = fields.get("account_id") or ""
        info = frame(domain, owner, name, epoch, version)
        key = HKDF(SHA256(), 32, None, info).derive(epoch_key(part["key"]) + secrets(part["sid"]))
        seal_id, nonce, ciphertext, tag = box[:16], box[16:28], box[28:-16], box[-16:]
        decryptor = Cipher(algorithms.AES(key), modes.GCM(nonce, tag)).decryptor()
        aad = frame("1", stream, owner, name, part["group"]) + b"\0\0\0\x10" + seal_id
        aad += frame(part["sid"], part["key"]) + len(envelope).to_bytes(4, "big") + envelope
        decryptor.authenticate_additional_data(aad)
        padded = decryptor.update(ciphertext) + decryptor.finalize()
        assert len(padded) % 32 == 0
        opened[part["group"]] = padded[: padded.rindex(b"\x80")]
    return opened


def test_every_sealed_value_opens_by_the_published_grammar_alone():
    # Given a value of every sealed stream, of one person, of two, and of nobody
    done = run(
        [
            sms_request(),
            voice_cdr(sender=OTHER),
            sms_cdr(recipient="", sender=""),
            reply("STOP"),
            reply("stop!! it"),
            b"x",
        ]
    )
    epochs = {str(epoch.id): epoch.key for epoch in done.ring.epochs.values()}
    persons = {person.sid: person.secret for person in done.ring.persons.values()}

    def secret_of(sid):
        if sid == "-":
            return b""
        return bytes.fromhex(sid[5:]) if sid.startswith("salt:") else persons[sid]

    # When somebody opens them who has the keys and the grammar, but not our code
    seen = set()
    for output in done.outputs:
        for message in output.messages:
            if b'"sealed":' in message.value:
                found = opened_by_hand(message.value, output.stream, epochs.__getitem__, secret_of)
                # Then it says what we say
                assert found == open_value(message.value, done.ring)
                seen.add(output.stream)
    assert seen == {"cleared", "cdr.pii", "content", "review", "quarantine", "suppressions"}


def test_a_sealed_value_is_one_json_object_with_sorted_keys_and_no_white_space():
    done = run([sms_request(), voice_cdr(sender=OTHER), sms_cdr(), reply("STOP"), reply("stop!! it"), b"x"])
    for output in done.outputs:
        for message in output.messages:
            if b'"sealed":' in message.value:
                fields = orjson.loads(message.value)
                assert orjson.dumps(fields, option=orjson.OPT_SORT_KEYS) == message.value
                assert fields["v"] == 1
                for part in fields["sealed"]:
                    assert set(part) == {"box", "group", "key", "sid"}
                    assert re.fullmatch(r"[0-9a-f]{32}|salt:[0-9a-f]{32}|-", part["sid"])
                    assert (len(b64decode(part["box"])) - 16 - 12 - 16) % 32 == 0


def test_the_loop_over_one_part_values_and_the_sealer_of_several_parts_speak_one_grammar():
    # Given values sealed in both ways, from the same entropy: of every padding, with the template's head and their own
    template = Planner(policy_of()).plan("acme", NOW_S).pii
    epoch = EpochKey(KeyId("pii", "platform", "2026-11", 1), EPOCH_KEY, None)
    ref, person = PersonRef("platform", b"t" * 16, "2026-11"), PersonSecret("ab" * 16, SECRET)
    for head in (None, b'{"account_id":"acme","more":"' + b"x" * 300 + b'","sealed":['):
        for text in (b"", b"x" * 31, b"x" * 32, b"x" * 1000):
            for who, secret in ((ref, person), (None, None)):
                entropy = Entropy(SEED)
                one = Sealer(KeyRing(), entropy, "cdr.pii", "acme", epoch)
                more = Sealer(KeyRing(), Entropy(SEED), "cdr.pii", "acme", epoch)
                written = []
                # When the loop seals two of them, so that the second finds what the first derived
                job = Job(template, who, text, head)
                seal_each([job, job], {ref: person}, entropy, lambda t, s=one, w=written: s.way(t, w.append))
                # Then each is what several parts of one give
                expected = more.several(head or template.head, template.tail, [("primary", secret, text)])
                assert written[0].value == expected
                assert written[1].value != expected
                assert (written[0].timestamp_ms, written[0].headers) == (template.at_ms, template.headers)


# --- what does not open -------------------------------------------------------------------------------------


def boxes(value):
    return orjson.loads(value)["sealed"]


def test_values_that_are_not_of_the_grammar_are_refused():
    (message,) = run([sms_cdr(content=None)]).of("cdr.pii")
    fields = orjson.loads(message.value)
    part = fields["sealed"][0]
    wrong = [
        b"", b"x", b"[]", b"null", b"{}", b'{"v":1}', b'{"sealed":[]}', b'{"sealed":5,"v":1}', b'{"sealed":[1],"v":1}',
        b'{"sealed":null,"v":1}', message.value[:-1],
        *(orjson.dumps({**fields, "v": version}) for version in (0, 2, "1", None)),
        orjson.dumps({**fields, "sealed": [{**part, "more": 1}]}),
        *(orjson.dumps({**fields, "sealed": [{**part, name: 5}]}) for name in part),
        *(orjson.dumps({**fields, "sealed": [{k: v for k, v in part.items() if k != name}]}) for name in part),
    ]  # fmt: skip
    for value in wrong:
        with pytest.raises(ValueError):
            take_apart(value)


@pytest.mark.parametrize(
    "change",
    [
        lambda _: "",
        lambda _: "=",
        lambda box: box[:-4],
        lambda box: box + "AAAA",
        lambda box: box + "\n",
        lambda box: " " + box,
        lambda box: box[:40] + "\n" + box[40:],
        lambda box: box.rstrip("=") + "==" if not box.endswith("==") else box.rstrip("="),
        lambda box: box[:10],
        lambda box: b64encode(b64decode(box)[:44]).decode(),
        lambda box: box.replace("+", "-").replace("/", "_") + "-",
        lambda box: "\u00e9" + box[1:],
    ],
)
def test_a_box_of_another_shape_does_not_open(change):
    done = run([sms_cdr(content=None)])
    value = done.of("cdr.pii")[0].value
    box = boxes(value)[0]["box"]
    assert change(box) != box
    with pytest.raises(ValueError):
        open_value(value.replace(box.encode(), change(box).encode()), done.ring)


@pytest.mark.parametrize("size", [1, 33, 65])
def test_one_ciphertext_is_written_in_one_way_only(size):
    # Given boxes of every length modulo 3, some of which leave bits of the last base64 letter unused
    key_id = KeyId("pii", "platform", "2026-11", 1)
    cipher = record_key(EPOCH_KEY, SECRET, key_info(key_id, "acme"))
    head, envelope, sid = aad_head("cdr.pii", "platform", "acme", "primary"), b"{}", b"ab" * 16
    box = grammar.seal_box(cipher, head, sid, framed(str(key_id).encode()), envelope, b"x" * size, bytes(28)).decode()
    part = grammar.Part("primary", str(key_id), sid.decode(), box)
    assert open_box(cipher, head, part, envelope) == b"x" * size
    # When any of the letters is another one, the unused bits included
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    last = len(box.rstrip("=")) - 1
    for at in (0, 20, last):
        for letter in alphabet.replace(box[at], ""):
            with pytest.raises(ValueError):  # Then it does not open
                open_box(cipher, head, replace(part, box=box[:at] + letter + box[at + 1 :]), envelope)


def test_a_part_opens_under_its_own_stream_account_group_sid_key_and_envelope_only():
    done = run([voice_cdr(sender=OTHER)])
    value = done.of("cdr.pii")[0].value
    sealed = take_apart(value)
    part = sealed.parts[0]
    epoch = next(epoch for epoch in done.ring.epochs.values() if str(epoch.id) == part.key)
    secrets = {person.sid: person.secret for person in done.ring.persons.values()}
    cipher = record_key(epoch.key, secrets[part.sid], key_info(epoch.id, "acme"))
    head = aad_head("cdr.pii", "platform", "acme", "primary")
    other = sealed.parts[1]
    assert open_box(cipher, head, part, sealed.envelope)
    wrong = [
        (aad_head("cleared", "platform", "acme", "primary"), part, sealed.envelope),
        (aad_head("cdr.pii", "acme", "acme", "primary"), part, sealed.envelope),
        (aad_head("cdr.pii", "platform", "other", "primary"), part, sealed.envelope),
        (aad_head("cdr.pii", "platform", "acme", "other"), part, sealed.envelope),
        (head, replace(part, sid=other.sid), sealed.envelope),
        (head, replace(part, key="pii/platform/2026-11/2"), sealed.envelope),
        (head, replace(part, box=other.box), sealed.envelope),
        (head, part, sealed.envelope + b" "),
        (head, part, sealed.envelope.replace(b"2026-11", b"2026-12")),
        (head, part, b""),
    ]
    for case in wrong:
        with pytest.raises(ValueError, match="does not open"):
            open_box(cipher, *case)


def test_a_part_of_another_record_of_the_same_two_persons_does_not_open():
    # Given two calls between the same two people, in the same month and account: their envelopes are the same
    done = run([voice_cdr(sender=OTHER), voice_cdr(sender=OTHER, record_id="rec-2")])
    first, second = (orjson.loads(message.value) for message in done.of("cdr.pii"))
    assert [part["sid"] for part in first["sealed"]] == [part["sid"] for part in second["sealed"]]
    # When the other party's part of one is put into the other
    first["sealed"][1] = second["sealed"][1]
    # Then it does not open
    with pytest.raises(ValueError):
        open_value(orjson.dumps(first, option=orjson.OPT_SORT_KEYS), done.ring)


def test_parts_can_be_neither_swapped_nor_left_out_nor_doubled():
    done = run([voice_cdr(sender=OTHER)])
    fields = orjson.loads(done.of("cdr.pii")[0].value)
    one, two = fields["sealed"]
    for parts in ([two, one], [one], [two], [one, one], [one, two, two], []):
        value = orjson.dumps({**fields, "sealed": parts}, option=orjson.OPT_SORT_KEYS)
        if parts:
            with pytest.raises(ValueError):
                open_value(value, done.ring)
        else:
            assert open_value(value, done.ring) == {}


REVISED = DEFAULT_POLICY.replace("revision = 1", "revision = 2")
MOVES = {
    "another record": ([sms_request()], [sms_request(record_id="rec-2")], "cleared"),
    "another account": ([sms_cdr()], [sms_cdr(account_id="other")], "content"),
    "another account of the platform": ([sms_cdr()], [sms_cdr(account_id="other")], "cdr.pii"),
    "another month": ([sms_cdr()], [sms_cdr(occurred_at="2026-10-21T11:22:33Z")], "cdr.pii"),
    "another day": ([sms_cdr()], [sms_cdr(occurred_at="2026-11-20T11:22:33Z")], "content"),
    "another person": ([sms_cdr()], [sms_cdr(recipient=OTHER)], "cdr.pii"),
    "nobody": ([sms_cdr()], [sms_cdr(recipient="")], "cdr.pii"),
    "another purpose": ([sms_request()], [sms_request(purpose="marketing")], "cleared"),
    "another place in quarantine": ([b"a"], [sms_cdr(), b"a"], "quarantine"),
    "another policy": ([sms_cdr()], None, "cdr.pii"),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_box_moved_elsewhere_does_not_open(move):
    # Given a value, and the place it is moved to, sealed by the same keys
    source, target, stream = MOVES[move]
    a = run(source)
    b = run(target) if target else run(source, policy=policy_of(default=REVISED))
    value = orjson.loads(b.of(stream)[0].value)
    value["sealed"][0]["box"] = boxes(a.of(stream)[0].value)[0]["box"]
    # When it is opened there
    with pytest.raises(ValueError):  # Then it does not open
        open_value(orjson.dumps(value, option=orjson.OPT_SORT_KEYS), b.ring)


@pytest.mark.parametrize("stream", ["content", "cleared", "review", "quarantine", "suppressions"])
def test_a_value_found_in_another_stream_does_not_open(stream):
    done = run([sms_request(), sms_cdr(), reply("STOP"), reply("stop!! it"), b"x"])
    value = done.of(stream)[0].value
    assert open_value(value, done.ring)
    for other in {"content", "cleared", "review", "quarantine", "suppressions", "cdr.pii"} - {stream}:
        with pytest.raises(ValueError):
            open_value(value, done.ring, stream=other)


def test_without_the_persons_secret_the_epoch_key_opens_nothing():
    done = run([sms_cdr()])
    value = done.of("cdr.pii")[0].value
    for secret in (b"", bytes(32)):
        ring = KeyRing()
        ring.epochs = done.ring.epochs
        ring.persons = {ref: person._replace(secret=secret) for ref, person in done.ring.persons.items()}
        with pytest.raises(ValueError):
            open_value(value, ring)


def test_without_the_epoch_key_the_persons_secret_opens_nothing():
    done = run([sms_cdr()])
    value = done.of("cdr.pii")[0].value
    ring = KeyRing()
    ring.persons = done.ring.persons
    ring.epochs = {ref: epoch._replace(key=bytes(32)) for ref, epoch in done.ring.epochs.items()}
    with pytest.raises(ValueError):
        open_value(value, ring)


def test_who_has_no_person_in_it_is_sealed_under_the_salt_of_the_batch():
    done = run([sms_cdr(recipient="", sender="ACME"), sms_cdr(recipient="12345", sender="ACME")])
    sids = {part["sid"] for message in done.of("cdr.pii") for part in boxes(message.value)}
    assert len(sids) == 1
    assert sids.pop().startswith("salt:")
    assert not done.prepared.needs.persons
    again = run([sms_cdr(recipient="", sender="ACME")], seed=bytes(32))
    assert boxes(again.of("cdr.pii")[0].value)[0]["sid"] != boxes(done.of("cdr.pii")[0].value)[0]["sid"]


def test_what_holds_keys_shows_none():
    person, epoch = PersonSecret("ab" * 16, SECRET), EpochKey(KeyId("pii", "platform", "2026-11", 1), EPOCH_KEY, None)
    ring = KeyRing()
    ring.epochs[EpochRef("pii", "platform", "2026-11")] = epoch
    shown = repr([person, epoch, ring, run([sms_cdr()]).prepared.needs.persons, Entropy(SEED)])
    for secret in (EPOCH_KEY, SECRET, SEED):
        assert repr(secret) not in shown
        assert secret.hex() not in shown
    assert PERSON not in shown


def test_the_clear_side_of_a_part_stands_in_the_envelope_as_it_is_written():
    head, tail = split_envelope({"account_id": "acme", "privacy": {"role": "x"}, "zeta": 1})
    assert head + tail == b'{"account_id":"acme","privacy":{"role":"x"},"sealed":[],"v":1,"zeta":1}'
    assert part_head("g", "d/o/e/1") + b'-"}' == b'{"group":"g","key":"d/o/e/1","sid":"-"}'
