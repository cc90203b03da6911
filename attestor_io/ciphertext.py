"""Ciphertexts as people have them: bytes, base64 text, and much that is neither.

What is no ciphertext is refused before KMS is asked, and called what it is: KMS would only say that
it is invalid.
"""

from __future__ import annotations

import base64
import contextlib
import re
from typing import TYPE_CHECKING, Final

from attestor_io.errors import InputError
from attestor_io.reading import Base64Text, Message, is_message, read_head

if TYPE_CHECKING:
    from attestor_io.deadline import Deadline
    from attestor_io.reading import Readable

CIPHERTEXT_MAX: Final = 6144  # CiphertextBlob and CiphertextForRecipient, KMS API reference
ALGORITHMS: Final = ("SYMMETRIC_DEFAULT", "RSAES_OAEP_SHA_1", "RSAES_OAEP_SHA_256", "SM2PKE")
"""EncryptionAlgorithm, same place."""

BASE64_OPTION: Final = "--base64"
BASE64_KEY: Final = 'encoding = "base64"'

_BLOB_MIN: Final = 65  # bytes: the shortest of moto's and LocalStack's; AWS's own have some 150
_HEX: Final = r"[0-9A-Fa-f]++"  # compiled for text alone, which no ciphertext is
_BASE64: Final = r"[A-Za-z0-9+/]++={0,2}"
_FROM_URL: Final = str.maketrans("-_", "+/")  # the alphabet of RFC 4648 section 5 into that of 4
_WRAPPED: Final = "base64 of "
_NESTED_MAX: Final = 3  # encodings around each other that are worth naming

_CLI_HINT: Final = "aws kms ... --query CiphertextBlob --output text | base64 -d prints the bytes"
_NOT_BASE64: Final = {  # texts that are not to be decoded as base64 either, and what to do
    "JSON of the AWS CLI": _CLI_HINT,
    "output of the AWS CLI": _CLI_HINT,
    "base64 text in quotation marks": _CLI_HINT,
    "UTF-16 text": "PowerShell's > writes that: have the bytes written that the text stands for",
    "hexadecimal text": "xxd -r -p prints the bytes that it stands for",
    "base64url text": "tr -- -_ +/ makes it base64 text",
}


def check_algorithm(name: str | None, what: str, key_id: str | None, *, has_context: bool) -> None:
    """Refuse an encryption algorithm that KMS does not have, or that does not fit the rest.

    `what` names the place where it stands ("--algorithm"). Raises InputError.
    """
    if name is not None and name not in ALGORITHMS:
        raise InputError(f"{what} {name} is none of {', '.join(ALGORITHMS)}")
    if is_symmetric(name):
        return
    if key_id is None:
        option = "--key-id" if what.startswith("--") else "key_id"
        reason = "an asymmetric ciphertext does not name its key"
        raise InputError(f"{what} {name} needs {option}: {reason}")
    if has_context:
        raise InputError(f"{what} {name} takes no encryption context: only symmetric keys have one")


def is_symmetric(algorithm: str | None) -> bool:
    """Whether an EncryptionAlgorithm, or none, is that of symmetric keys."""
    return algorithm in {None, "SYMMETRIC_DEFAULT"}


def read_ciphertext(
    path: str, deadline: Deadline, *, base64_text: bool, message: bool = False
) -> bytes | Message:
    """Read a CiphertextBlob, 1 to 6144 bytes, from a file or ("-") from standard input.

    With `message`, a message of the AWS Encryption SDK is returned as the open stream that it is.
    Raises InputError, and UnreachableError if it is not there by the deadline.
    """
    what = "standard input" if path == "-" else path
    size = head_size(base64_text=base64_text)
    head, rest = read_head(path, size, f"ciphertext {what}", deadline)
    with contextlib.ExitStack() as opened:
        opened.callback(rest.close)
        taken = take_ciphertext(head, rest, what, base64_text=base64_text, message=message)
        if isinstance(taken, Message):
            opened.pop_all()  # it is read further
        return taken


def take_ciphertext(
    head: bytes,
    rest: Readable,
    what: str,
    *,
    base64_text: bool,
    message: bool,
    option: str = BASE64_OPTION,
) -> bytes | Message:
    """The ciphertext of a stream, from which `head` was read: `head_size` bytes, or all there are.

    `option` is what asks for base64 in the command or the manifest. Raises InputError.
    """
    if not head.strip():
        raise InputError(f"ciphertext {what} is empty")
    form = _form(head)
    if base64_text:
        if form in _NOT_BASE64:
            raise _refusal(form, what, option)
        source = Base64Text(Message(head, rest), f"ciphertext {what}", *_bytes_hint(head, option))
        head, rest = source.read(CIPHERTEXT_MAX + 1), source
        if not head:
            raise InputError(f"ciphertext {what} is empty")
        inner = _form(head)
        form = f"{_WRAPPED}{inner}" if inner else ""
    if message and is_message(head):
        return Message(head, rest)
    if form:
        raise _refusal(form, what, option)
    if len(head) > CIPHERTEXT_MAX:
        most = f"longer than the {CIPHERTEXT_MAX} bytes that KMS takes"
        raise InputError(f"ciphertext {what} is {most}")
    return head


def head_size(*, base64_text: bool) -> int:
    """How many bytes of a stream tell whether a ciphertext is in it, and which."""
    return (2 * CIPHERTEXT_MAX if base64_text else CIPHERTEXT_MAX) + 1


def _bytes_hint(head: bytes, option: str) -> list[str]:
    """A hint for bytes where base64 text was asked for: whether they are a ciphertext already."""
    return [f"these are bytes already: leave out {option}"] if _is_likely(head) else []


def _refusal(form: str, what: str, option: str) -> InputError:
    """What to say of a ciphertext that is text of this form."""
    inner = form.rpartition(_WRAPPED)[2]
    if inner == "text":
        made = "attestor encrypt makes a ciphertext of a plaintext"
        hint = f"swapped arguments? {made}" if option == BASE64_OPTION else made
        return InputError(f"ciphertext {what} is {form}, which no ciphertext is", hint)
    if form == "base64 text":
        hint = f"add {option}"
    elif inner == "base64 text":
        hint = f"base64 -d removes one layer, and {option} another"
    else:
        hint = _NOT_BASE64[inner]
    return InputError(f"ciphertext {what} is {form}, not the bytes it stands for", hint)


def _form(data: bytes, nested: int = _NESTED_MAX) -> str:
    """What kind of text these first bytes of a ciphertext are; empty for bytes that are no text."""
    text = _utf_16(data)
    if text:
        return "UTF-16 text"
    text = _utf_8(data)
    if not text:
        return ""
    words = text.split()
    compact = "".join(words)
    if "CiphertextBlob" in text:
        return "JSON of the AWS CLI" if compact.startswith("{") else "output of the AWS CLI"
    if len(words) > 1 and any(word.startswith("arn:") for word in words):
        return "output of the AWS CLI" if _stands_for(words[0], nested) else "text"
    if compact.startswith('"') and _stands_for(compact.strip('"'), nested):
        return "base64 text in quotation marks"
    lines = text.split("\n")
    in_lines = len(words) <= len(lines) and len({len(word) for word in words[:-1]}) < 2
    return _stands_for(compact, nested, in_lines=in_lines) or "text"


def _stands_for(compact: str, nested: int, *, in_lines: bool = True) -> str:
    """What a text without white space is, if it stands for something that may be a ciphertext.

    Only what was in lines of one length, unlike words, may be base64 text.
    """
    octets = compact[: len(compact) // 2 * 2]
    if re.fullmatch(_HEX, compact) and _is_likely(bytes.fromhex(octets)):
        return "hexadecimal text"
    if not in_lines:
        return ""
    name = "base64 text"
    if "-" in compact or "_" in compact:
        name, compact = "base64url text", compact.translate(_FROM_URL)
    if not re.fullmatch(_BASE64, compact):
        return ""
    digits = compact.rstrip("=")
    decoded = base64.b64decode(digits[: len(digits) // 4 * 4])  # the rest may have been cut off
    if _is_likely(decoded):
        return name
    inner = _form(decoded, nested - 1) if nested else ""
    return "" if inner in {"", "text"} else f"{_WRAPPED}{inner}"


def _is_likely(data: bytes) -> bool:
    """Whether bytes may be a ciphertext, of KMS or of the AWS Encryption SDK."""
    return len(data) >= _BLOB_MIN and not (_utf_8(data) or _utf_16(data))


def _utf_8(data: bytes) -> str:
    """The printable text in UTF-8 that these bytes are, if they are; the end may be cut off."""
    data = data.removeprefix(b"\xef\xbb\xbf")  # utf-8-sig would import a codec for that
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            return ""
        text = data[: error.start].decode()
    return text if "".join(text.split()).isprintable() else ""


def _utf_16(data: bytes) -> str:
    """The text of ASCII in UTF-16 that these bytes are, if they are."""
    for mark, high in ((b"\xff\xfe", 1), (b"\xfe\xff", 0)):
        units = data.removeprefix(mark)
        if len(units) > 3 and not any(units[high::2]) and units[1 - high :: 2].isascii():
            text = units[1 - high :: 2].decode()
            return text if "".join(text.split()).isprintable() else ""
    return ""
