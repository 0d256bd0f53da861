"""The documentation: its commands run, its links lead somewhere, what it cites exists, and it leaves nothing out."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from argparse import Namespace
from pathlib import Path

import pytest

from deploy.kafka.broker import BrokerError, Cluster
from processors.decode import FIELDS
from processors.decode import REASONS as QUARANTINED
from processors.screen.verdict import GATEWAY_CODES
from processors.screen.verdict import REASONS as REFUSED
from schemas import errors
from schemas.catalog import CATALOG
from schemas.policy import CLAUSES
from streams.cli.main import NOUNS
from streams.config import _File, _KafkaTable, _PostgresTable, _RetentionTable, _VaultTable, _WatchTable, load
from streams.keys.roles import ROLES, principal

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = [README, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EGRESS = ROOT / "deploy" / "examples" / "egress_gateway.py"
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
ELSEWHERE = ("make ", "git clone ")
"""Commands that install or test the whole project; continuous integration runs them."""
BROKER = {"make kafka": "start", "make kafka-stop": "stop"}
"""What two of them run, of deploy/kafka/broker.py: that is run here."""
TABLES = {
    "": _File,
    "kafka": _KafkaTable,
    "postgres": _PostgresTable,
    "vault": _VaultTable,
    "retention": _RetentionTable,
    "watch": _WatchTable,
}
OTHERWISE = {"vault": {"token_file"}}
"""What a table may have instead of another key; a comment says so."""
TIMEOUT_S = 300


def text_of(path):
    return path.read_text(encoding="utf-8")


def blocks(path, info):
    return [body for found, body in FENCE.findall(text_of(path)) if found == info]


def commands(path, info):
    """Return the blocks of one kind as one script, as a reader types it, without what runs elsewhere."""
    lines = "\n".join(blocks(path, info)).splitlines()
    lines = [f"python deploy/kafka/broker.py {BROKER[line]}" if line in BROKER else line for line in lines]
    return "\n".join(line for line in lines if not line.startswith(ELSEWHERE))


def environment():
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def run(folder, *command, script=None):
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        input=script,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def run_script(folder, script):
    trap = """set -eE; trap 'echo "failed: $BASH_COMMAND" >&2' ERR\n"""
    done = run(folder, "bash", "-c", trap + script)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done


@contextlib.contextmanager
def a_checkout(folder):
    """Yield a folder that looks like a checkout; a broker that was started in it is stopped."""
    (folder / "deploy").symlink_to(ROOT / "deploy")
    try:
        yield folder
    finally:
        with contextlib.suppress(BrokerError):
            Cluster.at(folder / "streamveil-kafka").stop()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder that looks like a checkout after `make demo`."""
    with a_checkout(tmp_path_factory.mktemp("checkout")) as folder:
        done = run(folder, "streamveil", "demo", "--records", "3000")
        assert done.returncode == 0, done.stderr
        yield folder


# --- what is typed runs -------------------------------------------------------------------------------------


def test_every_command_of_the_readme_runs_as_it_stands(checkout):
    # Given a checkout in which `make demo` was run / When its commands are typed one after the other
    done = run_script(checkout, commands(README, "sh"))
    # Then each succeeds, and the outcomes are those that the README shows
    for shown in (
        "night.ndjson:4: not_json",
        "1 refuse opted_out",
        "2 expired older_than_everything",
        "2 emit",
    ):
        assert shown in text_of(README)
        assert shown in done.stderr
    assert "opted_out" in done.stdout
    assert '"on_registry"' in done.stdout
    assert "sent, sms" in done.stdout
    # on the broker that it has started and stopped too
    cluster = Cluster.at(checkout / "streamveil-kafka")
    assert f"Apache Kafka {cluster.version}, cluster {cluster.cluster_id}" in done.stdout
    assert not cluster.running


def test_every_runnable_command_of_the_operating_guide_runs_as_it_stands(tmp_path):
    script = commands(ROOT / "docs" / "operating.md", "sh runnable")
    assert script.count("streamveil") > 12
    done = run_script(tmp_path, script)
    assert "replayed: 1" in done.stdout
    assert "discarded: 1" in done.stdout
    assert "fresh" in done.stdout


def test_every_runnable_command_of_the_page_about_requests_runs_as_it_stands(tmp_path):
    done = run_script(tmp_path, commands(ROOT / "docs" / "subject-requests.md", "sh runnable"))
    for shown in ("own data: 1", "blocked_by_officer", "the restriction is ended", "1 records copied"):
        assert shown in done.stdout


def test_every_runnable_command_of_the_page_about_near_misses_runs_as_it_stands(tmp_path):
    done = run_script(tmp_path, commands(ROOT / "docs" / "review.md", "sh runnable"))
    for shown in ("pls stop this", "opted out: 1", '"reason":"opted_out"'):
        assert shown in done.stdout


def test_every_runnable_command_of_the_page_about_lists_runs_as_it_stands(tmp_path):
    done = run_script(tmp_path, commands(ROOT / "docs" / "campaign-lists.md", "sh runnable"))
    assert "ref,number,country,time_zone,verdict,reason,clause,defer_until,exemption\n" in done.stdout
    assert "1,+447700900800,GB,,refused,opted_out,KAL-5,,\n" in done.stdout
    assert "screened 3: 1 cleared, 2 refused" in done.stderr


def test_every_runnable_command_of_the_page_about_registries_runs_as_it_stands(tmp_path):
    done = run_script(tmp_path, commands(ROOT / "docs" / "registries.md", "sh runnable"))
    assert "us-dnc: 1 added, 0 were listed already; 1 deleted, 0 were not listed" in done.stdout
    assert "fresh" in done.stdout


def test_every_command_of_the_officers_guide_runs_as_it_stands(tmp_path):
    done = run_script(tmp_path, commands(ROOT / "docs" / "officer-guide.md", "sh"))
    assert "erased: person secrets destroyed in the platform's own data: 1" in done.stdout
    assert "complete, unchanged and in order" in done.stdout


def test_every_runnable_command_of_the_page_about_kafka_runs_as_it_stands(tmp_path):
    # Given a deployment on SQLite, which one of the page's sections moves
    with a_checkout(tmp_path) as folder:
        before = """printf 'x\n' > before.ndjson
            streamveil publish before.ndjson
            streamveil optout add +447700900800 --account acme --sender ACME
            streamveil optout add +447700900801 --authority officer --reason CALL-2
            """
        page = ROOT / "docs" / "kafka.md"
        done = run_script(folder, before + commands(page, "sh runnable"))
        # Then what the page shows comes out
        for shown in ("3 published (1 requests, 1 cdrs, 1 opaque)", "1 quarantine not_json", "1 refuse opted_out"):
            assert shown in text_of(page)
            assert shown in done.stderr
        for shown in ('"stream": "cdr.anonymous"', '"state": "revealed"', "not_json", "opted out: 2 entries written"):
            assert shown in done.stdout
        # and who may not is told so
        refused = run(folder / "streamveil-kafka", "streamveil", "tail", "cdr.pii", "--config", "gateway.toml")
        assert refused.returncode == 1
        said = re.search(r"ends with `(the brokers .+?)`", text_of(page).replace("\n", " "))[1]
        assert refused.stderr.startswith(f"streamveil: {said}")
        # and the opt-outs were carried over, with the senders that they name
        assert done.stderr.count("4 opt-outs exported") == 2
        moved = ("--account", "acme", "--channel", "sms", "--purpose", "marketing", "--config", "kafka.toml")
        verdict = run(folder, "streamveil", "screen", "+447700900800", "--sender", "ACME", *moved)
        assert '"opted_out"' in verdict.stdout


def test_what_make_does_for_kafka_is_what_is_run_here():
    for target, command in BROKER.items():
        (recipe,) = re.findall(
            rf"^{target.removeprefix('make ')}:.*\n\t(.*)$", text_of(ROOT / "Makefile"), re.MULTILINE
        )
        assert f"deploy/kafka/broker.py {command}" in recipe


def test_every_command_that_is_named_exists():
    for path in DOCS:
        for noun in re.findall(r"(?:^|[`|] ?)streamveil ([a-z]+)", text_of(path), re.MULTILINE):
            assert noun in NOUNS, f"{path.name}: {noun}"


def test_the_readme_shows_every_command():
    for noun in NOUNS:
        assert f"streamveil {noun}" in text_of(README) or noun == "demo"


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    for path in DOCS:
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", text_of(path), re.MULTILINE):
            assert target in targets, f"{path.name}: {target}"


# --- examples -----------------------------------------------------------------------------------------------


def test_the_worked_example_of_a_sealed_value_opens_and_is_of_the_grammar():
    (example,) = blocks(ROOT / "docs" / "sealed-values.md", "python")
    names = {}
    exec(compile(example, "sealed-values.md", "exec"), names)

    # Then the program reads it in the same way
    from schemas.sealed import KeyId, aad_head, key_info, open_box, record_key, take_apart

    sealed = take_apart(names["VALUE"].encode())
    cipher = record_key(names["EPOCH_KEY"], names["PERSON_SECRET"], key_info(KeyId.parse(sealed.parts[0].key), "acme"))
    head = aad_head("cdr.pii", "platform", "acme", "primary")
    assert open_box(cipher, head, sealed.parts[0], sealed.envelope) == names["plaintext"]


def test_the_egress_example_sends_what_is_cleared_once_and_prints_no_number(checkout, tmp_path):
    positions = tmp_path / "positions.json"
    command = (sys.executable, str(EGRESS), "--config", "streamveil-demo/streamveil.toml", "--until-idle")
    first = run(checkout, *command, "--positions", str(positions))
    assert first.returncode == 0, first.stderr
    assert re.fullmatch(r"( *[\d,]+ [a-z_, ]+\n)+", first.stdout)
    assert "sent, sms" in first.stdout
    assert positions.stat().st_mode & 0o777 == 0o600

    # When it runs again / Then nothing is left to send
    again = run(checkout, *command, "--positions", str(positions))
    assert (again.returncode, again.stdout) == (0, "")


def test_the_egress_example_ends_well_on_sigterm(checkout, tmp_path):
    # Given a gateway that has saved a position, so that it is at work
    positions = tmp_path / "positions.json"
    command = [
        sys.executable,
        str(EGRESS),
        "--config",
        "streamveil-demo/streamveil.toml",
        "--positions",
        str(positions),
    ]
    with subprocess.Popen(command, cwd=checkout, env=environment(), stdout=subprocess.PIPE, text=True) as gateway:
        while not positions.exists():
            assert gateway.poll() is None
            time.sleep(0.01)
        gateway.send_signal(signal.SIGTERM)
        output, _ = gateway.communicate(timeout=TIMEOUT_S)
    assert gateway.returncode == 0
    assert "sent" in output


def test_the_egress_example_says_in_one_line_that_there_is_no_log(tmp_path):
    done = run(tmp_path, sys.executable, str(EGRESS), "--log", "sqlite:///nowhere/log.db", "--until-idle")
    assert done.returncode == 1
    assert done.stderr.startswith("egress: ")
    assert done.stderr.count("\n") == 1


def test_the_example_configurations_and_roles_are_valid_and_complete(tmp_path):
    examples = ROOT / "deploy" / "examples"
    config, on_kafka = (
        load(Namespace(config=str(examples / name), log=None)) for name in ("streamveil.toml", "kafka.toml")
    )
    assert (config.log_path.is_absolute(), config.kms_dir.is_absolute()) == (True, True)
    assert (on_kafka.log_path, len(on_kafka.kafka.servers), on_kafka.kafka.username) == (None, 3, "eu.worker")
    assert config.watch == on_kafka.watch == ("127.0.0.1", 9464)
    assert config.roles_path == on_kafka.roles_path == examples / "roles.toml"
    written = [tomllib.loads(text_of(examples / name)) for name in ("streamveil.toml", "kafka.toml")]
    for name, table in TABLES.items():
        keys = {key for one in written for key in (one.get(name, {}) if name else one)}
        assert keys == set(table.__struct_fields__) - OTHERWISE.get(name, set()), name
    assert principal(config.roles_path, tmp_path / "keys.db").grants == ()  # nobody here is that user


# --- nothing leads nowhere ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(path):
    for target in LINK.findall(FENCE.sub("", text_of(path))):
        if target.startswith(("http://", "https://")):
            continue
        name, _, heading = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(file)), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", one).strip().lower().replace(" ", "-") for one in headings}, (
                target
            )


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_clause_that_is_cited_exists(path):
    for clause in re.findall(r"\b(?:INF|KAL|CAL|REG)-\d+", text_of(path)):
        assert clause in CLAUSES


def test_every_guarantee_names_a_clause_and_tests_that_exist():
    table = text_of(README).partition("## Guarantees")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if re.match(r"\| [A-Z]{3}-\d", line)]
    assert len(rows) >= 17
    for _, clause, _, tests, _ in rows:
        assert clause.strip() in CLAUSES
        named = LINK.findall(tests)
        assert named
        for test in named:
            assert re.fullmatch(r"tests/[a-z]+/test_\w+\.py", test)
            assert (ROOT / test).is_file()


def test_every_source_file_that_is_named_exists():
    for path in DOCS:
        for name in re.findall(r"`((?:schemas|processors|streams|deploy|tests|docs)/[\w./-]*)`", text_of(path)):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


# --- nothing is left out ------------------------------------------------------------------------------------


def test_every_stream_field_reason_and_code_is_documented():
    streams = text_of(ROOT / "docs" / "streams.md")
    for name in CATALOG:
        assert f"\n| `{name}` |" in streams, name
    for field in FIELDS - {"class_"}:  # the name of `class` in Python
        assert f"`{field}`" in streams, field
    for reason in {*REFUSED, *(reason for reason in QUARANTINED if ":" not in reason)}:
        assert f"`{reason}`" in streams, reason
    for vendor, code in GATEWAY_CODES.items():
        assert re.search(rf"\| {vendor} \| {code} \|", streams, re.IGNORECASE), vendor


def test_the_reasons_of_verdicts_are_in_the_order_of_the_rules():
    streams = text_of(ROOT / "docs" / "streams.md")
    table = streams.partition("in the order of the rules")[2].partition("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == REFUSED


def test_every_configuration_key_and_role_that_opens_something_is_documented():
    operating = text_of(ROOT / "docs" / "operating.md")
    for table in (_File, _KafkaTable, _PostgresTable, _VaultTable, _RetentionTable):
        for key in table.__struct_fields__:
            assert f"\n| `{key}` |" in operating, key
    for key in _WatchTable.__struct_fields__:
        assert f"one key, `{key}`" in operating, key
    for role in ROLES & {role for row in CATALOG.values() if row.domain for role in row.readers}:
        assert f"`{role}`" in operating, role


def test_every_error_stands_in_the_table_of_the_architecture():
    architecture = text_of(ROOT / "docs" / "architecture.md")
    for kind in (errors.Retriable, errors.Fatal):
        for error in kind.__subclasses__():
            if error.__module__ == errors.__name__:
                assert f"`{error.__name__}`" in architecture, error.__name__
