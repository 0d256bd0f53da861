from datetime import date

import pytest

from processors.roles import Tags, headers, privacy_object, tags
from schemas.errors import PolicyInvalid
from schemas.policy import parse_policy
from streams.config import packs_available

DAY = date(2026, 11, 21)
PACKS = packs_available()


def a_policy(account="", *, here="EU", adequate=("EU", "CH")):
    """The default policy of a platform in `here`, with one account `acme`."""
    text = PACKS["default"].replace('name = "platform"', f'name = "carrier"\njurisdiction = "{here}"')
    text = text.replace("[platform]", f"adequate = {list(adequate)}\n[platform]")
    if here is None:
        text = text.replace('jurisdiction = "None"', "")
    return parse_policy(f'{text}\n[[account]]\nid = "acme"\n{account}', "p")


def override(data_class, role, since="2026-01-01", until="2027-01-01"):
    return (
        f'[[account.role]]\ndata_class = "{data_class}"\nrole = "{role}"\nagreement = "MSA-17"\n'
        f'from = {since}\nuntil = {until}\nclause = "KAL-1"\n'
    )


def test_the_platform_is_processor_of_content_for_the_account():
    found = tags(a_policy(), "acme", "content", DAY)
    assert (found.role, found.controller, found.processor) == ("processor", "acme", "carrier")
    assert found.legal_basis == "customer_instructions"


def test_the_platform_is_controller_of_traffic_data_without_a_processor():
    found = tags(a_policy(), "acme", "traffic", DAY)
    assert (found.role, found.controller, found.processor) == ("controller", "carrier", None)
    assert found.purposes == ("routing", "security_and_fraud", "billing", "interconnect")


def test_an_agreement_changes_the_tags_while_it_holds():
    policy = a_policy(override("content", "controller") + override("traffic", "processor"))
    roles = [tags(policy, "acme", "content", day).controller for day in (date(2025, 12, 31), DAY, date(2027, 1, 1))]
    assert roles == ["acme", "carrier", "acme"]
    assert tags(policy, "acme", "traffic", DAY)[:3] == ("processor", "acme", "carrier")
    assert tags(policy, "other", "traffic", DAY).role == "controller"


@pytest.mark.parametrize(
    ("acts_as", "data_class", "to_account", "module"),
    [
        ("controller", "traffic", False, "scc-module-1"),
        ("controller", "content", False, "scc-module-2"),
        ("processor", "content", False, "scc-module-3"),
        ("processor", "traffic", False, "scc-module-1"),
        ("controller", "content", True, "scc-module-4"),
        ("processor", "content", True, "scc-module-3"),
        ("controller", "traffic", True, "scc-module-1"),
        ("processor", "traffic", True, "scc-module-2"),
    ],
)
def test_the_module_follows_from_the_roles_of_both_parties(acts_as, data_class, to_account, module):
    policy = a_policy(f'jurisdiction = "US"\nacts_as = "{acts_as}"\n')
    assert tags(policy, "acme", data_class, DAY, to_account=to_account).transfer == module


def test_an_agreement_changes_the_module_too():
    policy = a_policy('jurisdiction = "US"\n' + override("content", "controller"))
    assert tags(policy, "acme", "content", DAY).transfer == "scc-module-1"


@pytest.mark.parametrize(
    ("here", "there", "transfer"),
    [
        ("EU", "EU", "none"),
        ("US", "US", "none"),
        ("EU", "CH", "none"),
        ("CH", "EU", "none"),
        ("EU", "US", "scc-module-1"),
        ("US", "EU", "scc-module-1"),
        ("EU", None, "scc-module-1"),
        (None, "EU", "scc-module-1"),
        (None, None, "scc-module-1"),
    ],
)
def test_no_mechanism_is_needed_only_where_that_is_known(here, there, transfer):
    policy = a_policy(f'jurisdiction = "{there}"\n' if there else "", here=here)
    found = tags(policy, "acme", "traffic", DAY)
    assert found.transfer == transfer
    assert found.jurisdiction == here


def test_an_unlisted_account_is_of_unknown_jurisdiction():
    assert tags(a_policy(), "other", "content", DAY).transfer == "scc-module-2"


def test_records_of_nobody_known_still_have_tags():
    for account_id in ("", "platform", "a/b"):
        assert tags(a_policy(), account_id, "unclassified", DAY).controller == "carrier"


def test_a_class_without_a_rule_is_an_error():
    with pytest.raises(PolicyInvalid, match="support"):
        tags(a_policy(), "acme", "support", DAY)


TAGS = Tags(
    role="controller",
    controller="carrier",
    processor=None,
    legal_basis="contract",
    purposes=("billing",),
    data_class="traffic",
    policy="default/1",
    jurisdiction="EU",
    transfer="none",
)


def test_the_privacy_object_has_exactly_its_keys():
    privacy = {
        "role": "controller",
        "controller": "carrier",
        "processor": None,
        "legal_basis": "contract",
        "purposes": ("billing",),
        "data_class": "traffic",
        "policy": "default/1",
        "jurisdiction": "EU",
        "transfer": "none",
        "expires_at": "2027-12-01T00:00:00Z",
    }
    assert privacy_object(TAGS, "2027-12-01T00:00:00Z") == privacy
    assert privacy_object(TAGS, "2027-12-01T00:00:00Z", "2027-12-02T00:00:00Z") == {
        **privacy,
        "anonymous_from": "2027-12-02T00:00:00Z",
    }


def test_what_has_no_deadline_says_so():
    assert privacy_object(TAGS, None)["expires_at"] is None


def test_the_headers_are_role_class_and_policy():
    assert headers(TAGS) == (("role", b"controller"), ("class", b"traffic"), ("policy", b"default/1"))
