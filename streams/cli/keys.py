"""`streamveil keys status`: which keys there are, until when, and what holds them."""

import argparse
import time

from streams.cli.common import print_json, print_table
from streams.config import load


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `keys`."""
    noun = subparsers.add_parser("keys", help="the keys of this deployment")
    verbs = noun.add_subparsers(dest="verb", required=True, metavar="status")
    status = verbs.add_parser("status", help="epoch keys with their deadlines, destruction days, leases")
    status.add_argument("--json", action="store_true", help="one JSON object a key, then a summary")
    status.set_defaults(run=_status)


def _status(args: argparse.Namespace) -> int:
    from processors.retention import instant
    from streams.keys.sqlite import SqliteKeyStore

    config = load(args)
    store = SqliteKeyStore.open(config.keys_path, config.kms_dir, create=False)
    try:
        now_s = time.time()
        rows = [
            {
                "domain": key.domain,
                "owner": key.owner,
                "epoch": key.epoch,
                "versions": key.versions,
                "deadline": None if key.deadline_s is None else instant(key.deadline_s),
                "state": key.state,
            }
            for key in store.status(int(now_s))
        ]
        days, leases = store.kms.days(), len(store.leases(now_s))
    finally:
        store.close()
    if args.json:
        for row in rows:
            print_json(row)
        print_json({"summary": {"store": store.store_id, "destruction_days": days, "leases": leases}})
        return 0
    if rows:
        print_table([name.upper() for name in rows[0]], [tuple(row.values()) for row in rows])
    print(f"store {store.store_id}: {len(rows)} epochs, {len(days)} destruction days alive, {leases} leases alive")
    return 0
