"""`attestor policy render`, `check` and `explain`: key policies that ask for attested enclaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from attestor import say
from attestor_commands.inputs import (
    EIFS_OPTION,
    FILES_ARGUMENT,
    JSON_OPTION,
    NITROTPM_PCR_OPTION,
    PCR_OPTION,
    ROOT_OPTION,
    evidence_errors,
    parse_file,
    trusted_roots,
)
from attestor_commands.report import print_report
from attestor_io.errors import InputError, RefusedError
from attestor_io.text_options import parse_context

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from keypolicy import Measured, Source

UNDETERMINED: Final = 8  # exit status of explain where the key policy alone cannot tell
# what tells images apart, and `nitro-cli`, or `nitro-tpm-pcr-compute`, prints
_TAKEN: Final = {"enclave": (0, 1, 2, 8), "nitrotpm": (4, 12)}


@click.group()
def policy() -> None:
    """Write, check and explain key policies that ask for attested enclaves, or instances."""


@policy.command()
@click.option(
    "--principal",
    "principals",
    metavar="ARN",
    multiple=True,
    required=True,
    help="role of the enclave's parent instance, repeatable",
)
@click.option(
    "--admin",
    "admins",
    metavar="ARN",
    multiple=True,
    required=True,
    help="who manages the key without using it, repeatable",
)
@click.option(
    "--encryptor",
    "encryptors",
    metavar="ARN",
    multiple=True,
    help="who may encrypt only, repeatable",
)
@click.option(
    "--action",
    "actions",
    metavar="ACTION",
    multiple=True,
    default=["kms:Decrypt"],
    help="what an enclave may do, repeatable  [default: kms:Decrypt]",
)
@PCR_OPTION
@NITROTPM_PCR_OPTION
@click.option(
    "--measurements",
    metavar="FILE",
    multiple=True,
    help="an image, as nitro-cli or nitro-tpm-pcr-compute printed it, repeatable",
)
@EIFS_OPTION
@click.option(
    "--document",
    "documents",
    metavar="FILE",
    multiple=True,
    help="an image, by a document, repeatable",
)
@click.option(
    "--take",
    metavar="N",
    multiple=True,
    type=click.IntRange(0, 31),
    help="PCR to take from those, repeatable  [default: which of 0, 1, 2 and 8 are there; "
    "of a NitroTPM 4 and 12]",
)
@click.option("--role-arn", metavar="ARN", help="computes PCR3")
@click.option("--instance-id", metavar="ID", help="computes PCR4")
@click.option(
    "--signing-certificate", metavar="FILE", help="computes PCR8; PEM, DER, or a signed EIF"
)
@click.option(
    "--bind",
    "binds",
    metavar="NAME=VALUE:WHO",
    multiple=True,
    help="a context value for one role's ARN or instance's id only, repeatable",
)
@ROOT_OPTION
def render(
    principals: tuple[str, ...],
    admins: tuple[str, ...],
    encryptors: tuple[str, ...],
    actions: tuple[str, ...],
    binds: tuple[str, ...],
    **sources: Any,
) -> None:
    """Write a key policy that gives plaintexts to attested enclaves (or instances with a NitroTPM)
    only.

    \b
    Examples:
      attestor policy render --principal ROLE --admin ROLE --measurements build.json
      attestor policy render --principal ROLE --admin ROLE --eif app.eif --take 0
      attestor policy render --principal ROLE --admin ROLE --signing-certificate cert.pem
      attestor policy render --principal ROLE --admin ROLE --pcr 0=OLD --pcr 0=NEW

    A PCR that is named again begins another image, for a roll-over. PCR8 survives new builds, but
    admits every older image signed with that certificate; PCR0, or PCR1 with PCR2, must be renewed
    at each build; the other PCRs alone tell no image from another and are refused. Of a NitroTPM,
    PCR4 with PCR12 is one build, PCR7 what these Secure Boot keys have signed. Documents are
    verified at their own timestamp.
    """
    import keypolicy

    with evidence_errors():
        source, images = _images(sources)
        rendered = keypolicy.render(
            source=source,
            principals=principals,
            admins=admins,
            encryptors=encryptors,
            actions=actions,
            images=images,
            binds=[keypolicy.Bind.parse(text) for text in binds],
        )
    for warning in rendered.warnings:
        say("note", warning)
    print_report(rendered.policy, lambda _: rendered.text, as_json=False)


def _images(sources: Mapping[str, Any]) -> tuple[Source, list[dict[int, bytes]]]:
    """Whose PCRs they are, and those of each image: given, measured or attested, each with what is
    computed for all of them.
    """
    import keypolicy
    from attestor_commands.arguments import merge, parse_images, parse_nitrotpm_pcr, parse_pcr
    from attestor_commands.images import measured_image, read_certificate

    computed = {}
    if sources["role_arn"]:
        computed[3] = keypolicy.pcr_of_role(sources["role_arn"])
    if sources["instance_id"]:
        computed[4] = keypolicy.pcr_of_instance(sources["instance_id"])
    if sources["signing_certificate"]:
        der = read_certificate(sources["signing_certificate"])
        computed[8] = keypolicy.pcr_of_certificate(der)
    measured = [(path, parse_file(path, keypolicy.measured)) for path in sources["measurements"]]
    measured += [(path, measured_image(path)) for path in sources["eifs"]]
    measured += [(path, _attested(path, sources["root"])) for path in sources["documents"]]
    if sources["take"] and not measured:
        raise InputError("--take needs --measurements, --eif or --document to take PCRs from")
    given = {
        "enclave": parse_images(map(parse_pcr, sources["pcrs"])),
        "nitrotpm": parse_images(map(parse_nitrotpm_pcr, sources["nitrotpm_pcrs"])),
    }
    source = _only_kind(
        {kind for kind, images in given.items() if images}
        | {found.source for _, found in measured}
        | ({"enclave"} if computed else set())
    )
    taken = [_taken(path, found, sources["take"]) for path, found in measured]
    images = given[source] + taken
    return source, [merge(image.items(), computed.items()) for image in images or [{}]]


def _only_kind(kinds: set[str]) -> Source:
    """The one kind of machine that PCRs are of; an enclave where there are none."""
    if len(kinds) > 1:
        raise InputError(
            "PCRs of an enclave and of a NitroTPM in one policy: a guard of one kind denies the "
            "other",
            "use a key for each",
        )
    return "nitrotpm" if "nitrotpm" in kinds else "enclave"


def _attested(path: str, root: str | None) -> Measured:
    """The PCRs that an image attested, without those of an enclave that are zero."""
    from keypolicy import Measured

    document = _verified_at_its_time(path, root, allow_debug=False).document
    if document.source == "nitrotpm":
        return Measured("nitrotpm", dict(document.nitrotpm_pcrs))
    return Measured("enclave", {n: value for n, value in document.pcrs.items() if any(value)})


def _taken(path: str, measured: Measured, asked: Sequence[int]) -> dict[int, bytes]:
    """Take from one image the PCRs that are asked for, or those of the default that are there.

    One that is asked for and missing is an error: the policy would silently pin less.
    """
    source, pcrs = measured
    missing = next((index for index in asked if index not in pcrs), None)
    if missing is not None:
        unsigned = ": the image is not signed" if missing == 8 and source == "enclave" else ""
        raise InputError(
            f"--take {missing}: {path} has no PCR{missing}{unsigned}",
            f"it has {', '.join(f'PCR{index}' for index in sorted(pcrs))}",
        )
    return {index: pcrs[index] for index in asked or _TAKEN[source] if index in pcrs}


def _verified_at_its_time(path: str, root: str | None, *, allow_debug: bool) -> Any:
    """A document that was genuine when it was signed, which says nothing about its age."""
    from nsm.document import AttestationDocument, Expectations, verify

    def verified(data: bytes) -> Any:
        parsed = AttestationDocument.parse(data)
        expect = Expectations(source=None, allow_debug=allow_debug)
        return verify(parsed, roots=trusted_roots(root), at=parsed.signed_at, expect=expect)

    return parse_file(path, verified, f"document {path}")


@policy.command()
@FILES_ARGUMENT
@JSON_OPTION
def check(file: tuple[str, ...], as_json: bool) -> int:
    """Find what makes a key policy open or useless; nothing found prints nothing.

    \b
    Examples:
      aws kms get-key-policy --key-id KEY --query Policy --output text | attestor policy check -
      attestor policy check policies/*.json

    FILE is the policy in JSON; "-" reads standard input. The policy is read as that of a key for
    attested enclaves only. A warning is printed, too, but is no fault. Of several FILEs each
    finding names its own, and nothing is printed unless all of them are policies. Exit status: 0 no
    fault, 4 faults.
    """
    import keypolicy
    from attestor_commands import policy_report

    with evidence_errors():
        policies = [_read_policy(name) for name in file]
        found = [keypolicy.check(policy) for policy in policies]
    for name, findings in zip(file, found, strict=True):
        print_report(
            policy_report.findings_object(findings, name if len(file) > 1 else None),
            policy_report.findings_text,
            as_json=as_json,
        )
    faults = [finding for findings in found for finding in findings if not finding.warning]
    return RefusedError.status if faults else 0


def _read_policy(path: str) -> Any:
    from keypolicy import Policy

    return parse_file(path, Policy.parse)


@policy.command()
@click.argument("file")
@click.option(
    "--document", metavar="FILE", help="the attestation document that is sent  [default: none]"
)
@PCR_OPTION
@NITROTPM_PCR_OPTION
@click.option(
    "--measurements",
    metavar="FILE",
    help="the PCRs of such a document, as nitro-cli or nitro-tpm-pcr-compute printed them",
)
@click.option("--eif", metavar="FILE", help="the image that such a document is of, measured here")
@click.option(
    "--principal",
    metavar="ARN",
    required=True,
    help="role, user or assumed-role session that calls",
)
@click.option(
    "--action",
    metavar="ACTION",
    default="kms:Decrypt",
    help="what it calls  [default: kms:Decrypt]",
)
@click.option("--key-id", metavar="ARN", help="the key  [default: one of the principal's account]")
@click.option(
    "--context",
    "encryption_context",
    metavar="NAME=VALUE",
    multiple=True,
    callback=parse_context,
    help="encryption context, repeatable",
)
@ROOT_OPTION
@JSON_OPTION
def explain(
    file: str,
    principal: str,
    action: str,
    key_id: str | None,
    encryption_context: dict[str, str],
    as_json: bool,
    **sources: Any,
) -> int:
    """Tell statement by statement what a key policy decides about a call.

    \b
    Examples:
      attestor policy explain policy.json --document doc --principal arn:aws:iam::...:role/parent
      attestor policy explain policy.json --eif app.eif --principal arn:aws:iam::...:role/parent

    FILE is the policy in JSON; "-" reads standard input. The document is verified at its own
    timestamp; --pcr, --measurements and --eif stand for one whose other PCRs are not known. What
    depends on them or on other policies is named, not guessed. Exit status: 0 allowed, 4 denied, 8
    cannot be told.
    """
    from datetime import UTC, datetime

    import keypolicy
    from attestor_commands import policy_report

    with evidence_errors():
        parsed = _read_policy(file)
        keypolicy.check_question(action)
        if key_id is not None and not keypolicy.is_key_arn(key_id):
            raise InputError(f"--key-id {key_id} is not the ARN of a key")
        mixed = keypolicy.mixed_partitions((principal, key_id or principal))
        if mixed:
            raise InputError(f"--principal and --key-id: {mixed}")
        verified, pcrs = _asked_pcrs(action, sources)
        of_source = dict([pcrs]) if pcrs else {}
        request = keypolicy.Request(
            principal=principal,
            action=action,
            resource=key_id or _some_key(parsed, principal),
            pcrs=of_source.get("enclave"),
            nitrotpm_pcrs=of_source.get("nitrotpm"),
            more_pcrs=verified is None,
            context=encryption_context,
        )
        found = keypolicy.evaluate(parsed, request)
    print_report(
        policy_report.evaluation_object(found, request, verified, now=datetime.now(UTC)),
        policy_report.evaluation_text,
        as_json=as_json,
    )
    return {"allowed": 0, "denied": RefusedError.status}.get(found.decision.value, UNDETERMINED)


def _asked_pcrs(action: str, sources: Mapping[str, Any]) -> tuple[Any, Measured | None]:
    """The verified document if there is one, and the PCRs of the call, None without attestation."""
    import keypolicy
    from attestor_commands.arguments import merge, parse_nitrotpm_pcr, parse_pcr
    from attestor_commands.images import measured_image

    document, measurements, eif = sources["document"], sources["measurements"], sources["eif"]
    claimed = {
        "enclave": [parse_pcr(text) for text in sources["pcrs"]],
        "nitrotpm": [parse_nitrotpm_pcr(text) for text in sources["nitrotpm_pcrs"]],
    }
    if document is None and measurements is None and eif is None and not any(claimed.values()):
        return None, None
    # GenerateRandom takes one, too; no key policy is asked about it
    if action.lower() not in {known.lower() for known in keypolicy.RECIPIENT_ACTIONS}:
        raise InputError(
            f"{action} carries no attestation document",
            f"leave it out; {', '.join(keypolicy.RECIPIENT_ACTIONS)} carry one",
        )
    if document is None:
        if measurements:
            read = parse_file(measurements, keypolicy.measured)
            claimed[read.source] += read.pcrs.items()
        if eif:
            claimed["enclave"] += measured_image(eif).pcrs.items()
        source = _only_document({kind for kind, pairs in claimed.items() if pairs})
        return None, keypolicy.Measured(source, merge(claimed[source]))
    if measurements is not None or eif is not None or any(claimed.values()):
        raise InputError(
            "--document tells every PCR: --pcr, --measurements and --eif contradict it or say the "
            "same",
            "leave out --document, or all of them",
        )
    verified = _verified_at_its_time(document, sources["root"], allow_debug=True)
    found = verified.document
    pcrs = found.pcrs if found.source == "enclave" else found.nitrotpm_pcrs
    return verified, keypolicy.Measured(found.source, dict(pcrs))


def _only_document(kinds: set[str]) -> Source:
    if len(kinds) > 1:
        raise InputError(
            "PCRs of an enclave and of a NitroTPM are given, but a document has one kind",
            "leave one of them out",
        )
    return "nitrotpm" if "nitrotpm" in kinds else "enclave"


def _some_key(parsed: Any, principal: str) -> str:
    """A key of the principal's account, if the policy does not look at which or in what region."""
    conditions = (
        condition.key.lower()
        for statement in parsed.statements
        for condition in statement.conditions
    )
    if (
        any(statement.resources != ("*",) for statement in parsed.statements)
        or "aws:requestedregion" in conditions
    ):
        raise InputError(
            "the policy looks at the key or at its region", "give the key's ARN as --key-id"
        )
    partition, account = (principal.split(":") + [""] * 5)[1:5:3]
    return f"arn:{partition}:kms:*:{account}:key/*"
