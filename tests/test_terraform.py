"""The Terraform example: its policy, its user data, and what its files say of each other.

`make terraform-test` validates it against AWS's provider, which has to be downloaded.
"""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
from typing import TYPE_CHECKING, Final

import pytest

from keypolicy import Policy, check
from tests.conftest import ROOT
from tests.test_deployment import Host

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Run

FOLDER: Final = ROOT / "enclave" / "terraform"
MAIN: Final = (FOLDER / "main.tf").read_text(encoding="utf-8")
PAGE: Final = (FOLDER / "README.md").read_text(encoding="utf-8")
ALL: Final = MAIN + "".join(
    (FOLDER / name).read_text(encoding="utf-8") for name in ("variables.tf", "outputs.tf")
)
PARENT_FILES: Final = sorted(
    re.findall(r'"([^"]+)"', re.findall(r"parent_files = toset\(\[(.*?)\]\)", MAIN, re.DOTALL)[0])
)
PLACES: Final = ("/opt/attestor", "/etc/nitro_enclaves", "/etc/systemd/system")
UNIT: Final = "attestor-enclave.service"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_the_policy_of_the_example_passes_the_check(host: Host) -> None:
    """The page's own blocks; the policy meets the preconditions of the key."""
    script = "".join(re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    run = host.command("bash", "-euo", "pipefail", "-c", script)
    assert run.status == 0, run.err
    policy = (host.folder / "key-policy.json").read_text()
    role = "arn:aws:iam::111122223333:role/my-application-parent"
    conditions = re.findall(r"strcontains\(local\.key_policy, \"(.*)\"\)$", MAIN, re.MULTILINE)
    assert len(conditions) == 2
    for text in conditions:
        assert text.replace("${aws_iam_role.parent.arn}", role).replace('\\"', '"') in policy
    assert not check(Policy.parse(policy.encode()))


def test_the_role_of_the_page_is_that_of_the_example() -> None:
    (name,) = re.findall(r'^name +?= "([a-z-]+)"$', PAGE, re.MULTILINE)
    (pattern,) = re.findall(r'"aws_iam_role" "parent" {\n  name +?= "(.*)"', MAIN)
    assert f"role/{pattern.replace('${var.name}', name)} " in PAGE


def test_every_name_is_declared_and_every_variable_used() -> None:
    variables = set(re.findall(r'^variable "(\w+)"', ALL, re.MULTILINE))
    assert set(re.findall(r"\bvar\.(\w+)", ALL)) == variables
    assert set(re.findall(r"\blocal\.(\w+)", ALL)) == {"key_policy", "parent_files"}
    resources = set(re.findall(r'^resource "(\w+)" "(\w+)"', ALL, re.MULTILINE))
    assert set(re.findall(r"(?<!data\.)\b(aws_\w+)\.(\w+)", ALL)) <= resources
    data = set(re.findall(r'^data "(\w+)" "(\w+)"', ALL, re.MULTILINE))
    assert set(re.findall(r"\bdata\.(\w+)\.(\w+)", ALL)) == data


def test_no_account_and_no_secret_is_in_it() -> None:
    assert re.findall(r"\b\d{12}\b", ALL) == []
    assert set(re.findall(r"\b\d{12}\b", PAGE)) == {"111122223333"}


def test_the_parent_is_given_what_its_units_need() -> None:
    assert set(PARENT_FILES) == {
        "attestor-status.service",
        "attestor-vsock@.service",
        "common.sh",
        "configure",
        "run-enclave",
    }
    assert all((ROOT / "enclave" / "parent" / name).is_file() for name in PARENT_FILES)
    for wanted in ('http_tokens                 = "required"', "hop_limit = 1 ", "enabled = true"):
        assert wanted in MAIN
    assert "kms:" not in MAIN.replace("kms:RecipientAttestation:PCR", "")  # the role has none


def test_an_instance_is_made_after_what_its_user_data_needs() -> None:
    """What it mentions, such as the bucket and its objects, comes before it anyway."""
    instance = MAIN.partition('resource "aws_instance" "parent" {\n')[2].partition("\n}\n")[0]
    (listed,) = re.findall(r"^  depends_on = \[(.*)\]$", instance, re.MULTILINE)
    assert set(listed.split(", ")) == {
        "aws_iam_role_policy.parent",
        "aws_vpc_security_group_egress_rule.https",
    }
    assert {"aws_s3_object.parent", "aws_s3_object.image"} <= set(
        re.findall(r"\baws_s3_object\.\w+", instance)
    )


def user_data(host: Host, **lines: str) -> Run:
    """Run the user data as it is put together, in folders of the test's."""
    values = {"region": "eu-west-1", "bucket": "a-bucket", "cpus": "2", "memory": "2048"}
    values |= {"parent_files": " ".join(PARENT_FILES)} | lines
    (parts,) = re.findall(r'user_data = join\("\\n", \[\n(.*?)\n  \]\)', MAIN, re.DOTALL)
    head = [line.strip().removesuffix(",")[1:-1] for line in parts.splitlines()[:4]]
    text = "\n".join([*head, (FOLDER / "user-data.sh").read_text(encoding="utf-8")])
    for expression, name in {
        "${var.region}": "region",
        "${aws_s3_bucket.enclave.id}": "bucket",
        "${var.enclave_cpus}": "cpus",
        "${var.enclave_memory}": "memory",
        '${join(" ", local.parent_files)}': "parent_files",
    }.items():
        text = text.replace(expression, values[name])
    assert "${var" not in text
    assert "${aws" not in text
    for place in PLACES:
        text = text.replace(place, f"{host.folder}{place}")
        (host.folder / place[1:]).mkdir(parents=True, exist_ok=True)
    (host.folder / "user-data").write_text(text)
    return host.command("bash", str(host.folder / "user-data"))


def equip(host: Host, configured: Path) -> None:
    """Stand-ins for what Amazon Linux has; S3's gives the parent's files, and an image."""
    host.stand_in("dnf")
    started = '$(sed -n s/^ExecStart=//p "$unit")'
    host.stand_in(
        "systemctl",
        f"unit={host.folder}/etc/systemd/system/{UNIT}\n"
        f'case "$*" in "enable --now attestor-enclave") exec {started};; esac',
    )
    host.stand_in(
        "aws",
        'case $6 in *.eif) echo image > "$7" && exit;; esac\n'
        f'cp "{ROOT}/enclave/parent/${{6##*/}}" "$7"\n'
        # the script writes where the units read, which is not the test's to have
        f'case $7 in */configure) sed -i "s|/etc/attestor-enclave|{configured}|" "$7";; esac',
    )
    host.runner()


def test_the_user_data_makes_a_parent(host: Host) -> None:
    configured = host.folder / "configured"
    equip(host, configured)
    run = user_data(host)
    assert run.status == 0, run.err
    assert host.calls("dnf") == [
        ["install", "--assumeyes", "--quiet", "aws-nitro-enclaves-cli", "socat"]
    ]
    allocator = (host.folder / "etc/nitro_enclaves/allocator.yaml").read_text()
    assert allocator == "---\nmemory_mib: 2048\ncpu_count: 2\n"
    units = {path.name for path in (host.folder / "etc/systemd/system").iterdir()}
    assert units == {name for name in PARENT_FILES if name.endswith(".service")} | {UNIT}
    assert (configured / "kms.env").read_text().startswith("VSOCK_PORT=8000\n")
    started = host.calls("nitro-cli")
    assert started[-1][0] == "run-enclave"
    assert started[-1][started[-1].index("--memory") + 1] == "2048"
    assert [call[1:3] for call in host.calls("systemctl") if call[0] == "enable"] == [
        ["nitro-enclaves-allocator"],
        ["--now", "attestor-vsock@kms"],
        ["--now", "attestor-enclave"],
    ]


def test_the_enclave_is_started_at_each_boot_after_the_allocator(host: Host) -> None:
    """By a unit that tries again, also where the allocator failed: with Requires= it would not."""
    equip(host, host.folder / "configured")
    assert user_data(host).status == 0
    path = host.folder / "etc/systemd/system" / UNIT
    unit = configparser.ConfigParser(interpolation=None, delimiters="=")
    unit.read_string(path.read_text())
    allocator = "nitro-enclaves-allocator.service"
    assert unit["Unit"]["Wants"] == allocator
    assert allocator in unit["Unit"]["After"].split()
    assert "Requires" not in unit["Unit"]
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    service = unit["Service"]
    assert (service["Type"], service["Restart"]) == ("oneshot", "on-failure")
    # else systemd ends what nitro-cli leaves behind, which is the enclave
    assert service["RemainAfterExit"] == "yes"
    assert unit["Install"]["WantedBy"] == "multi-user.target"
    before = len(host.calls("nitro-cli"))
    assert host.command(*shlex.split(service["ExecStart"])).status == 0
    assert len(host.calls("nitro-cli")) == before + 2  # describe-eif and run-enclave
    if shutil.which("systemd-analyze"):
        done = host.command("systemd-analyze", "verify", str(path))
        assert (done.status, done.out, done.err) == (0, b"", "")


def test_an_enclave_that_does_not_start_fails_the_user_data(host: Host) -> None:
    equip(host, host.folder / "configured")
    host.runner(status=1)
    run = user_data(host)
    assert run.status == 1
    assert "nitro-cli run-enclave failed" in run.err


def test_user_data_that_fails_says_so(host: Host) -> None:
    equip(host, host.folder / "configured")
    host.stand_in("aws", "exit 3")
    run = user_data(host)
    assert run.status == 3
    assert host.calls("nitro-cli") == []
