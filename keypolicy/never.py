"""What of a key policy can never apply: it looks right, and does nothing."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Final

from keypolicy.actions import closest_action, fits_an_action
from keypolicy.findings import RECIPIENT_ACTIONS, Problem
from keypolicy.model import abbreviated, is_key_arn
from keypolicy.operators import covers_action

if TYPE_CHECKING:
    from collections.abc import Iterator

    from keypolicy.model import Statement
    from keypolicy.openings import Openings

_GUESSES_MAX: Final = 10  # for actions of one statement; a guess takes 0.2 ms


def check_guards(openings: Openings) -> Iterator[Problem]:
    """Find Denys of which some stop every document of an enclave, and some every one of a NitroTPM.

    A guard denies where its key is absent: one for each kind leaves nobody.
    """
    known, statements = openings.documents, openings.policy.statements
    for action in RECIPIENT_ACTIONS:
        stops = [
            [
                deny
                for deny in statements
                if deny.effect == "Deny"
                and openings.denies_everyone(deny, action, stopped)
                and not openings.denies_everyone(deny, action, passed)
            ]
            for stopped, passed in (
                (known.any_enclave, known.any_nitrotpm),
                (known.any_nitrotpm, known.any_enclave),
            )
        ]
        if all(stops):
            problem = (
                f"{stops[0][0].label} denies {action} with every document of an enclave, and "
                f"{stops[1][0].label} with every document of a NitroTPM: nobody is left"
            )
            yield Problem("both_kinds", problem, "use a key for each kind")
            return


def check_names(statement: Statement) -> Iterator[Problem]:
    """Find actions that are not known, and resources that no key has."""
    unknown = dict.fromkeys(name for name in statement.actions if not fits_an_action(name))
    for action in itertools.islice(unknown, _GUESSES_MAX):
        problem = f"action {abbreviated(action)} is not known here: if misspelt, it fits no call"
        guess = closest_action(action)
        fix = "compare it with the actions of AWS KMS"
        # AWS may have added one since
        said = f"did you mean {guess}?" if guess else fix
        yield Problem("action", problem, said, warning=not guess)
    if not statement.not_resource and not any(map(_may_be_key, statement.resources)):
        resource = abbreviated(statement.resources[0])
        problem = f"resource {resource} is no key's ARN, so that the statement never applies"
        yield Problem("resource", problem, 'write "*", which is the key that has this policy')


def _may_be_key(resource: str) -> bool:
    """Tell whether a Resource may fit the ARN of a key; a pattern does unless that is plain."""
    if not re.search(r"[*?]|\$\{", resource):
        return is_key_arn(resource)
    other_service = re.match(r"arn:[^:*?]*:(?!kms:)[^:*?]*:", resource)
    return ":alias/" not in resource and not other_service


def check_never(statement: Statement, openings: Openings) -> Iterator[Problem]:
    """Find an Allow for documents, by its conditions or by Denys, that no document passes."""
    if statement.effect != "Allow" or not openings.is_weighed:
        return
    attested = openings.rests_on_document(statement)
    covered = [action for action in RECIPIENT_ACTIONS if covers_action(statement, action)]
    never = [
        action
        for action in covered
        # one that Denys close without a document in view was not meant for documents
        if (attested or openings.opens(statement, action, openings.documents.unknown))
        and not openings.may_ever_open(statement, action)
    ]
    if never != covered:  # of what a pattern covers, some may be denied on purpose
        named = {name.lower() for name in statement.actions}
        never = [action for action in never if action.lower() in named]
    if never:
        problem = (
            f"never allows {', '.join(never)}: no attestation document meets its conditions and "
            "passes every Deny"
        )
        yield Problem("never_allowed", problem, "ask for values of PCRs that the Denys let pass")
