# What Streamveil may do at a Vault or OpenBao, for the mounts `transit` and `secret` and the prefix `streamveil-`.
# `setup.py` puts other names in their places.

# One key for each destruction day: made, looked at, and deleted when its day is over. No key ever leaves the server.
path "transit/keys/streamveil-*" {
  capabilities = ["create", "read", "update", "delete"]
  denied_parameters = {
    "allow_plaintext_backup" = []
    "derived"                = []
    "exportable"             = []
  }
}

# All names of the mount, so give Streamveil a mount of its own if others are a secret.
path "transit/keys" {
  capabilities = ["list"]
}

# No "create" here: with it, `encrypt` would make a key that was destroyed again.
path "transit/encrypt/streamveil-*" {
  capabilities = ["update"]
}
path "transit/decrypt/streamveil-*" {
  capabilities = ["update"]
}

# The entry of each key store: what it is known by, its destruction counter, which keys were destroyed. No "delete".
path "secret/data/streamveil-*" {
  capabilities = ["create", "read", "update"]
}

# Its own login.
path "auth/token/renew-self" {
  capabilities = ["update"]
}
path "auth/token/revoke-self" {
  capabilities = ["update"]
}
