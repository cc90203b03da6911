"""Check the key policies and enclave image files of a change, and say in its diff what is found.

POLICIES and IMAGES hold a file name or pattern a line. Each finding of `attestor policy check`
becomes an annotation of its file, and so does each refusal; the measurements of images go to the
log. The files are those of somebody who proposes a change: nothing that is in them, or in their
names, reaches the log as a command to the runner. Exit status: that of the first command that
failed, 2 where a pattern matches nothing, or where nothing is asked for.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = (sys.executable, "-I", "-m", "attestor")
TIMEOUT = 300  # seconds for one file
ENTRIES_MAX = 100_000  # that are looked at for one pattern: links can make a small tree endless
USAGE, LATE = 2, 5  # exit statuses as attestor has them
WRONG = "attestor: error: "


def main() -> int:
    """Check what the environment names; the exit status."""
    checks = {"POLICIES": check_policy, "IMAGES": describe_image}
    lines = {name: os.environ.get(name, "").split("\n") for name in checks}
    asked = [(name, line.strip()) for name in checks for line in lines[name] if line.strip()]
    if not asked:
        annotate("error", "", "neither `policies` nor `images` names a file")
        return USAGE
    statuses = []
    for name, pattern in asked:
        try:
            files = matching(pattern)
        except NotSearchedError as error:
            annotate("error", "", str(error))
            return USAGE
        if not files:
            annotate("error", "", f"nothing is called {pattern}")
            statuses.append(USAGE)
        statuses += [checks[name](file) for file in files]
    return next((status for status in statuses if status), 0)


class NotSearchedError(Exception):
    """Where the files of a pattern may be cannot all be looked at."""


def matching(pattern: str) -> list[str]:
    """The files that fit a pattern, hidden ones too, and what is called so: a change that brings
    such a name must not lead away from all the others. Raises NotSearchedError.
    """
    fits = re.compile(expression(pattern)).fullmatch
    literal = re.match(r"([^*?]*/)?", pattern)
    found = list(islice(below(literal[0] if literal else ""), ENTRIES_MAX + 1))
    if len(found) > ENTRIES_MAX:
        raise NotSearchedError(
            f"more than {ENTRIES_MAX} names to look at: {pattern}\n"
            "fix: begin the pattern with a folder's name"
        )
    named = {pattern} if os.path.lexists(pattern) else set()
    return sorted(named.union(name for name, is_folder in found if not is_folder and fits(name)))


def expression(pattern: str) -> str:
    """A pattern as a regular expression: `*` and `?` are in one name, `**` is any folders."""
    wild = {"**/": "(?:[^/]+/)*", "**": "(?s:.*)", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"((?:(?<=/)|^)\*\*/|(?:(?<=/)|^)\*\*$|\*|\?)", pattern)
    return "".join(wild.get(part, re.escape(part)) for part in parts)


def below(start: str) -> Iterator[tuple[str, bool]]:
    """Everything below a folder ("" or with a slash behind it), and whether it is a folder.

    Links are followed, as whoever uses the files does, but for those that lead back up, or out of
    what is checked out. A folder that cannot be read raises NotSearchedError: what is in it would
    pass unseen. A link that leads nowhere is no folder; whoever reads it finds that.
    """
    ahead = [(start, os.path.realpath(start or "."), frozenset[str]())]
    while ahead:
        folder, real, above = ahead.pop()
        try:
            entries = os.listdir(real)
        except (FileNotFoundError, NotADirectoryError):
            if folder == start:
                return  # that nothing fits is an error of its own
            continue
        except OSError as error:
            raise NotSearchedError(f"{folder} cannot be looked at: {error.strerror}") from error
        above |= {real}
        for entry in entries:
            is_folder = os.path.isdir(os.path.join(real, entry))
            yield folder + entry, is_folder
            if is_folder and folder + entry != ".git":
                target = os.path.realpath(os.path.join(real, entry))
                if target not in above and is_inside(target, real, entry):
                    ahead.append((f"{folder}{entry}/", target, above))


def is_inside(target: str, real: str, entry: str) -> bool:
    """Whether a folder's entry is no link, or leads to what is in the folder of this process."""
    return target == os.path.join(real, entry) or target.startswith(os.path.realpath(".") + "/")


def check_policy(file: str) -> int:
    """Annotate what `attestor policy check` finds in a file; its exit status."""
    done = attestor("policy", "check", "--json", "--", file)
    if not done.stdout:
        return refused(file, done)
    for found in json.loads(done.stdout)["findings"]:
        text = f"{found['statement']}: {found['problem']} [{found['code']}]\nfix: {found['fix']}"
        annotate(found["severity"], file, text)
    print(f"{shown(file)}: {'no fault' if done.returncode == 0 else 'faults, see above'}")
    return done.returncode


def describe_image(file: str) -> int:
    """Show what `attestor eif describe` measures in a file; its exit status."""
    done = attestor("eif", "describe", "--", file)
    if not done.stdout:
        return refused(file, done)
    end = secrets.token_hex(16)
    print(f"::stop-commands::{end}\n{shown(file)}\n{done.stdout}::{end}::", flush=True)
    return done.returncode


def attestor(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of attestor; one that takes too long ends as one that could be tried again."""
    command = [*PROGRAM, *arguments]
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, LATE, "", f"took more than {TIMEOUT} s")


def refused(file: str, done: subprocess.CompletedProcess[str]) -> int:
    """Annotate an error of attestor's with its hints, if there is one; the exit status."""
    if done.returncode:
        annotate("error", file, done.stderr.strip().removeprefix(WRONG))
    return done.returncode


def annotate(severity: str, file: str, text: str) -> None:
    """Tell the runner to show a text beside a file, escaped as its toolkit does it."""
    where = f"file={escaped(file, properties=True)}," if file else ""
    print(f"::{severity} {where}title=attestor::{escaped(text)}", flush=True)


def shown(file: str) -> str:
    """A file name in the log, where `##[command]` is a command wherever it stands in a line."""
    return ascii(file).replace("#", r"\x23")


def escaped(text: str, *, properties: bool = False) -> str:
    """A text as the data of a workflow command, or as the value of one of its properties."""
    pairs = [("%", "%25"), ("\r", "%0D"), ("\n", "%0A")]
    for plain, code in [*pairs, *([(":", "%3A"), (",", "%2C")] if properties else [])]:
        text = text.replace(plain, code)
    return text.encode("utf-8", "backslashreplace").decode()


if __name__ == "__main__":
    sys.exit(main())
