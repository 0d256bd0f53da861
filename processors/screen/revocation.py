"""Which entries a keyword such as STOP or START writes: the policy's rule, and from a date on the revoke-all rule.

From `[screening.revoke_all] from` on, a keyword of somebody in its countries revokes everything of the account: account
scope, class all, every channel (47 CFR 64.1200(a)(10)). It never covers less than the policy's keyword rule does.
"""

from datetime import UTC, date, datetime, timedelta
from typing import get_args

from processors.screen.destination import place_of
from processors.screen.suppression import Rule, Tokens, scope_id
from schemas.fields import Party
from schemas.inbound import Channel
from schemas.policy import Policy


def keyword_rules(
    policy: Policy, person: Party, at_s: int, account_id: str, sender: str, campaign_id: str | None, tokens: Tokens
) -> tuple[Rule, ...]:
    """Return the rules of the entries that a keyword of a person changes, each once.

    `at_s`: when it was said (Unix s); `sender`: the normalised address it was said to. For an opt-in too: it then lifts
    what the policy's rule made before the date, and what the revoke-all rule made after it.
    """
    keyword = policy.screening.keyword
    scope = scope_id(keyword.scope, account_id, sender, campaign_id, tokens)
    rules = [Rule(scope, keyword.class_, channel, "person") for channel in keyword.channels]
    if revokes_all(policy, person, at_s):
        rules += [Rule(f"account:{account_id}", "all", channel, "person") for channel in get_args(Channel)]
    return tuple(dict.fromkeys(rules))


def revokes_all(policy: Policy, person: Party, at_s: int) -> bool:
    """Return whether a keyword that a person says at `at_s` revokes everything of the account.

    Whoever may be in one of the rule's countries, or anywhere, is in it.
    """
    day = day_of(policy, at_s)
    regions: frozenset[str | None] = place_of(person, None).regions or frozenset({None})
    return any(policy.revokes_all(region, day) for region in regions)


def day_of(policy: Policy, at_s: int) -> date:
    """Return the date of an instant (Unix s) in the policy's time zone; the years 1 and 9999 hold what lies beyond."""
    at_s = min(max(at_s, -62_135_510_400), 253_402_214_400)
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=at_s)).astimezone(policy.zone).date()
