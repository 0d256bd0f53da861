"""What a deployment refuses to open."""

import asyncio
from argparse import Namespace

import pytest

from schemas.errors import InputInvalid, KeysUnusable
from schemas.outbound import Message, Output
from streams.config import load
from streams.deployment import Deployment, open_log


def config_in(folder):
    return load(Namespace(config="streamveil.toml", log=f"sqlite:///{folder}/data/log.db"))


async def opened(config):
    async with Deployment.open(config) as deployment:
        return deployment.store.store_id


async def append(config, stream):
    log = await open_log(config)
    await log.append([Output(stream, 0, [Message(0, None, (), b"{}")])])
    await log.close()


def test_a_lost_key_store_is_never_replaced_beside_a_log_that_has_outputs(tmp_path):
    config = config_in(tmp_path)
    asyncio.run(opened(config))
    asyncio.run(append(config, "verdicts"))
    for path in config.folder.glob("keys.db*"):
        path.unlink()
    with pytest.raises(KeysUnusable, match="restore it from its backup"):
        asyncio.run(opened(config))
    assert not list(config.folder.glob("keys.db*"))


def test_a_log_that_has_input_only_gets_a_key_store(tmp_path):
    config = config_in(tmp_path)
    asyncio.run(append(config, "traffic"))
    assert asyncio.run(opened(config)) == asyncio.run(opened(config))


def test_no_commit_that_brokers_take_on_late_comes_after_its_key_lease(tmp_path):
    # Given a transaction time-out that leaves no room within the lease
    (tmp_path / "streamveil.toml").write_text(
        "key_lease_s = 30\n[kafka]\nplaintext = true\ntransaction_timeout_ms = 16000\n"
    )
    args = Namespace(config=str(tmp_path / "streamveil.toml"), log="kafka://127.0.0.1:9092")
    with pytest.raises(InputInvalid, match="key_lease_s must be at least twice"):
        load(args)
    # and one that does: so long before the end of its lease a worker begins no commit
    (tmp_path / "streamveil.toml").write_text(
        "key_lease_s = 30\n[kafka]\nplaintext = true\ntransaction_timeout_ms = 9000\n"
    )
    config = load(args)
    local = config_in(tmp_path)

    async def margins():
        async with Deployment.open(local) as deployment:
            return deployment.margin_s, Deployment(config, deployment.log, deployment.store).margin_s

    assert asyncio.run(margins()) == (0.0, 9.0)
