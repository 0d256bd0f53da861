"""Makes a Vault or OpenBao ready for Streamveil: engines, policy, AppRole; prints the `[vault]` table.

    python deploy/vault/setup.py --address https://HOST:8200 --token-file FILE --secret-id-file FILE [--ca-file FILE] …

The token is an administrator's and is only read. What is there already stays; the policy is written anew, and each
run makes one more secret id. Who runs it needs `sudo` on sys/auth and sys/mounts.
"""

import argparse
import os
import ssl
import sys
from pathlib import Path
from typing import Any, NamedTuple

import httpx

POLICY = Path(__file__).resolve().parent / "streamveil.hcl"
LIFE = "1h"
"""Of what a login gives; Streamveil renews it in time."""


class SetupError(Exception):
    """The server is not as it must be; one line that says what to do."""


class Names(NamedTuple):
    """What things are called on the server."""

    mount: str = "transit"
    counter_mount: str = "secret"
    prefix: str = "streamveil-"
    role: str = "streamveil"


class Made(NamedTuple):
    """What a process of Streamveil logs in with."""

    role_id: str
    secret_id: str

    def __repr__(self) -> str:
        return "Made()"


def policy_text(names: Names) -> str:
    """Return the policy for these names."""
    text = POLICY.read_text(encoding="utf-8")
    for mount, ours in (("transit", names.mount), ("secret", names.counter_mount)):
        text = text.replace(f'path "{mount}/', f'path "\0{ours}/')
    return text.replace("\0", "").replace("/streamveil-*", f"/{names.prefix}*")


def set_up(client: httpx.Client, names: Names) -> Made:
    """Make what is missing, and return what to log in with. Raises SetupError; blocks."""
    mounts = _ask(client, "GET", "sys/mounts")["data"]
    if f"{names.mount}/" not in mounts:
        _ask(client, "POST", f"sys/mounts/{names.mount}", {"type": "transit"})
    elif mounts[f"{names.mount}/"]["type"] != "transit":
        raise SetupError(f"{names.mount} is another engine: name another --mount")
    if f"{names.counter_mount}/" not in mounts:
        _ask(client, "POST", f"sys/mounts/{names.counter_mount}", {"type": "kv", "options": {"version": "2"}})
    elif (mounts[f"{names.counter_mount}/"]["options"] or {}).get("version") != "2":
        raise SetupError(f"{names.counter_mount} is no key-value engine of version 2: name another --counter-mount")
    if "approle/" not in _ask(client, "GET", "sys/auth")["data"]:
        _ask(client, "POST", "sys/auth/approle", {"type": "approle"})
    _ask(client, "PUT", f"sys/policies/acl/{names.role}", {"policy": policy_text(names)})
    role = f"auth/approle/role/{names.role}"
    settings = {"token_policies": [names.role], "token_no_default_policy": True, "token_ttl": LIFE}
    _ask(client, "POST", role, settings)
    role_id = _ask(client, "GET", f"{role}/role-id")["data"]["role_id"]
    return Made(role_id, _ask(client, "POST", f"{role}/secret-id")["data"]["secret_id"])


def _ask(client: httpx.Client, method: str, path: str, body: object = None) -> dict[str, Any]:
    try:
        answer = client.request(method, f"/v1/{path}", json=body)
        said = answer.json() if answer.content else {}
    except (httpx.HTTPError, ValueError) as error:
        raise SetupError(f"no answer to {method} {path}: {type(error).__name__}") from None
    if answer.status_code >= 300:
        why = "; ".join(map(str, said.get("errors") or ())) or "no reason given"
        raise SetupError(f"{method} {path} is refused with {answer.status_code}: {why}")
    return dict(said)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make a Vault or OpenBao ready for Streamveil.")
    parser.add_argument("--address", required=True, help="https://HOST:PORT")
    parser.add_argument("--token-file", required=True, type=Path, help="the token of an administrator")
    parser.add_argument("--secret-id-file", required=True, type=Path, help="where the secret id is written to (0600)")
    parser.add_argument("--ca-file", help="the certificate authority, if it is not the system's")
    parser.add_argument("--namespace")
    for name, value in Names._field_defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, help=f"({value})")
    return parser


def main() -> int:
    """Set up the server that the arguments name; return the exit status."""
    args = _parser().parse_args()
    names = Names(args.mount, args.counter_mount, args.prefix, args.role)
    try:
        headers = {"X-Vault-Token": args.token_file.read_text(encoding="ascii").strip()}
        if args.namespace:
            headers["X-Vault-Namespace"] = args.namespace
        context = ssl.create_default_context(cafile=args.ca_file)
        with httpx.Client(base_url=args.address, headers=headers, verify=context, trust_env=False) as client:
            made = set_up(client, names)
        descriptor = os.open(args.secret_id_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(descriptor, 0o600)
            file.write(made.secret_id)
    except (SetupError, OSError, ValueError) as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    table = {"address": args.address, "mount": names.mount, "counter_mount": names.counter_mount}
    table |= {"prefix": names.prefix, "namespace": args.namespace, "ca_file": args.ca_file}
    table |= {"role_id": made.role_id, "secret_id_file": str(args.secret_id_file)}
    print("[vault]")
    for key, value in table.items():
        if value is not None:
            print(f'{key} = "{value}"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
