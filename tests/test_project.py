"""What the project says of itself is so: help, exit statuses, links, versions, locks."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING, Final

import click
import pytest
from click.testing import CliRunner

import attestor
from attestor_commands.inject.manifest import parse
from attestor_commands.policy import UNDETERMINED
from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

README: Final = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS_PAGE: Final = ROOT / "docs" / "commands.md"
PAGES: Final = sorted(
    [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        ROOT / "enclave" / "README.md",
        ROOT / "enclave" / "terraform" / "README.md",
    ]
)
STEERING: Final = (
    "AWS_ENDPOINT_URL AWS_ENDPOINT_URL_KMS AWS_ENDPOINT_URL_S3 AWS_ENDPOINT_URL_STS "
    "AWS_ENDPOINT_URL_* AWS_IGNORE_CONFIGURED_ENDPOINT_URLS AWS_USE_FIPS_ENDPOINT "
    "AWS_USE_DUALSTACK_ENDPOINT AWS_REGION AWS_DEFAULT_REGION AWS_DATA_PATH AWS_CA_BUNDLE "
    "REQUESTS_CA_BUNDLE CURL_CA_BUNDLE SSL_CERT_FILE SSL_CERT_DIR HTTP_PROXY HTTPS_PROXY NO_PROXY "
    "ALL_PROXY AWS_PROFILE AWS_DEFAULT_PROFILE AWS_CONFIG_FILE AWS_SHARED_CREDENTIALS_FILE "
    "credential_process endpoint_url ca_bundle AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY "
    "AWS_SESSION_TOKEN AWS_WEB_IDENTITY_TOKEN_FILE AWS_ROLE_ARN "
    "AWS_CONTAINER_CREDENTIALS_FULL_URI AWS_CONTAINER_CREDENTIALS_RELATIVE_URI "
    "AWS_CONTAINER_AUTHORIZATION_TOKEN AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE "
    "AWS_EC2_METADATA_SERVICE_ENDPOINT AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE "
    "AWS_EC2_METADATA_DISABLED AWS_EC2_METADATA_V1_DISABLED "
    "AWS_CREDENTIAL_FILE BOTO_CONFIG AWS_CSM_ENABLED AWS_MAX_ATTEMPTS "
    "BOTOCORE_EXPERIMENTAL__PLUGINS NSM_LIBRARY NSM_SOURCE NSM_TPM LD_PRELOAD LD_LIBRARY_PATH "
    "LD_AUDIT GLIBC_TUNABLES GCONV_PATH PYTHON* PYTHONPATH PYTHONHOME PYTHONSTARTUP "
    "PYTHONUSERBASE PYTHONSAFEPATH OPENSSL_CONF OPENSSL_MODULES SSLKEYLOGFILE PATH HOME "
    "TMPDIR HOSTALIASES /etc/hosts /etc/resolv.conf /etc/ld.so.cache ~/.aws/config "
    "~/.aws/credentials ~/.aws/models ATTESTOR_* ATTESTOR_CONFIG _ATTESTOR_COMPLETE"
).split()  # what could redirect or weaken a call, by issue and by experiment


def names_of(group: click.Group, prefix: str = "") -> list[str]:
    """Every command by its full name, and no group: "decrypt", "policy check"."""
    context = click.Context(group)
    return [
        name
        for short in group.list_commands(context)
        for command in (group.get_command(context, short),)
        for name in (
            names_of(command, f"{short} ") if isinstance(command, click.Group) else [prefix + short]
        )
    ]


COMMANDS: Final = names_of(attestor.cli)


def help_of(command: str) -> str:
    result = CliRunner().invoke(
        attestor.cli, [*command.split(), "--help"], terminal_width=100, max_content_width=100
    )
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_the_documents_show_the_help(command: str) -> None:
    """Write it anew with: python -m tests.test_project."""
    assert block(command, help_of(command)) in COMMANDS_PAGE.read_text(encoding="utf-8")


def block(command: str, text: str) -> str:
    return (
        f"<!-- begin help of {command} -->\n"
        f"```\n{text.rstrip()}\n```\n"
        f"<!-- end help of {command} -->"
    )


def test_every_status_stands_in_docstring_readme_and_code() -> None:
    classes = [value for value in vars(attestor).values() if isinstance(value, type)]
    used = {value.status for value in classes if issubclass(value, attestor.AttestorError)}
    documented = {
        int(number) for number in re.findall(r"^    (\d)    ", attestor.__doc__ or "", re.MULTILINE)
    }
    in_readme = {int(number) for number in re.findall(r"^\| (\d) \|", README, re.MULTILINE)}
    assert used | {0, UNDETERMINED} == documented == in_readme


def test_the_statuses_in_the_help_of_decrypt() -> None:
    text = " ".join(help_of("decrypt").split())
    assert (
        "Exit status: 0 done, 1 bug, 2 usage, 3 no module, 4 KMS refused, 5 try again, 6 not "
        "authentic, 7 output." in text
    )


def test_the_version() -> None:
    result = CliRunner().invoke(attestor.cli, ["--version"])
    assert result.output == f"attestor {attestor.__version__}\n"


def test_dependencies_are_justified_and_locked_with_hashes() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"]
    for requirement in [
        *project["dependencies"],
        *(one for extra in extras.values() for one in extra),
    ]:
        assert re.search(rf'"{re.escape(requirement)}",? +# \w', text), requirement
    for lock in (ROOT / "requirements").glob("*.txt"):
        content = lock.read_text(encoding="utf-8")
        assert content.count("==") <= content.count("--hash=sha256:")
        assert "://" not in content


def test_importing_attestor_loads_no_sdk_and_opens_nothing() -> None:
    program = (
        "import sys, attestor\n"
        "names = ('botocore', 'boto3', 'cryptography', 'cbor2', 'ctypes')\n"
        "print([m for m in names if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, text=True
    )
    assert done.stdout == "[]\n"


def test_the_group_has_one_command_for_each_help_block() -> None:
    assert isinstance(attestor.cli, click.Group)
    text = COMMANDS_PAGE.read_text(encoding="utf-8")
    assert sorted(re.findall(r"<!-- begin help of ([a-z -]+) -->", text)) == sorted(COMMANDS)


# ---- the documents


def test_the_readme_is_a_door() -> None:
    assert len(README.splitlines()) <= 250
    table = README.partition("## Commands\n")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"`([a-z -]+)`(?=[^|]* \| )", table)) == sorted(COMMANDS)
    linked = set(re.findall(r"\]\((docs/[a-z-]+\.md)\)", README))
    assert linked == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md"], ids=lambda page: str(page.name))
def test_no_document_sends_anybody_to_a_strangers_package(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for wrong in (r"pip3? install [^`\n]*(?<!nitro-)\battestor\b", r"['\" ]attestor\["):
        assert not re.search(wrong, text), wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)]+))?\)", prose_of(page)):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors_of(target), f"{path}#{anchor}"


def prose_of(page: Path) -> str:
    """A page without its blocks of code."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """The names by which the headings of a page are linked."""
    return {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    }


def test_what_steers_a_call_is_documented() -> None:
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert [name for name in STEERING if f"`{name}`" not in page] == []


def test_what_the_image_sets_is_documented() -> None:
    """Its ENV, and what its entrypoint exports beside settings of its own."""
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    (block_of_env,) = re.findall(
        r"^ENV ((?:.*\\\n)*.*)$", (ROOT / "Dockerfile.enclave").read_text(), re.MULTILINE
    )
    names = re.findall(r"(\w+)=", block_of_env)
    listed = re.search(r"The image of this project sets (.*?)\. ", page, re.DOTALL)
    assert listed
    assert re.findall(r"`(\w+)`", listed[1]) == names
    entrypoint = (ROOT / "enclave" / "entrypoint.sh").read_text(encoding="utf-8")
    exported = set(re.findall(r"^\s*export ([A-Z]\w+)", entrypoint, re.MULTILINE))
    assert exported == {"AWS_REGION", "AWS_EC2_METADATA_V1_DISABLED", "HOME"}
    assert "#!/usr/bin/python3 -BI" in (ROOT / "enclave" / "assemble").read_text(encoding="utf-8")


def test_the_example_of_a_manifest_is_one() -> None:
    """README and the manifest's own page show the same; endpoint and roots are in it."""
    page = (ROOT / "docs" / "manifest.md").read_text(encoding="utf-8")
    (short,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    text, *others = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert re.sub(r" +# .*", "", short) == text
    manifest = parse(text.encode(), {"NODE": "3"}, {})
    assert manifest.endpoint_url == "https://kms.eu-west-1.amazonaws.com"
    assert manifest.ca_bundle == "/etc/attestor/aws-roots.pem"
    assert [entry.kind for entry in manifest.entries] == ["secret", "file"]
    head = text.partition("[")[0]
    for other in others:
        settings = {"RELEASE": "8"} if "RELEASE" in other else {}
        assert parse((head + other).encode(), settings, {}).entries


def test_the_errors_of_the_documents_are_public() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .* \| (\d?) ?\|$", page, re.MULTILINE)
    public = {
        name
        for name in attestor.__all__
        if isinstance(value := getattr(attestor, name), type) and issubclass(value, Exception)
    }
    assert {name for name, _ in rows} == public
    for name, status in rows:
        assert not status or getattr(attestor, name).status == int(status)


def write_help_into_the_documents() -> None:
    """Replace every block between its markers."""
    text = COMMANDS_PAGE.read_text(encoding="utf-8")
    for command in COMMANDS:
        pattern = rf"<!-- begin help of {command} -->.*?<!-- end help of {command} -->"
        text = re.sub(
            pattern,
            lambda _, name=command: block(name, help_of(name)),  # type: ignore[misc]
            text,
            flags=re.DOTALL,
        )
    COMMANDS_PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_help_into_the_documents()
