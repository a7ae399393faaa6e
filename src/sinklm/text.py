"""Text from outside in messages: file names, error texts of libraries, generated text."""

import difflib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable

LONGEST = 400  # characters of a quoted error text
MOST_NAMES = 5  # in a hint
UTF_16 = (BOM_UTF16_LE, BOM_UTF16_BE)  # how files in UTF-16 begin

# Control characters except tab and line end, and the characters that reorder text: in a terminal
# they move the cursor, change colours and titles, or show a name other than the real one.
_CODES = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {code: repr(chr(code))[1:-1] for code in _CODES if chr(code) not in "\t\n"}


def printable(text: str) -> str:
    r"""Replace terminal control characters by their escapes: the character ESC becomes ``\x1b``."""
    return text.translate(_ESCAPES)


def one_line(error: object) -> str:
    """Return the text of an error in one line of at most `LONGEST` characters, with its type.

    The type is left out if the text is the message of an OSError or a ValueError, which explain
    themselves.
    """
    text = printable(" ".join(str(error).split()))
    if len(text) > LONGEST:
        text = text[: LONGEST - 2] + " …"
    return text if text and isinstance(error, OSError | ValueError | str) else f"{type(error).__name__}: {text}"


def message_of(error: BaseException) -> str:
    """Return the message of an error in one line without its type, or the type if it is empty."""
    return one_line(str(error).strip() or type(error).__name__)


def decoded(content: bytes, name: str, remedy: str) -> str:
    """Return the text of a file in UTF-8, without a byte order mark.

    Args:
        name: of the file.
        remedy: what to do with a file that has NUL bytes.

    Raises:
        ValueError: it is not UTF-8, or has NUL bytes.
    """
    if b"\0" in content and not content.startswith(UTF_16):
        raise ValueError(f"{name} contains NUL bytes, so it is not a text file: {remedy}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 ({error.reason} at byte {error.start}): convert it to UTF-8") from error


def not_utf8(content: bytes) -> str:
    """Return why bytes are not text in UTF-8, or an empty text if they are."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"{error.reason} at byte {error.start}"
    return "it has NUL bytes, as UTF-16 has" if b"\0" in content else ""


def near_names(name: str, names: Iterable[str]) -> list[str]:
    """Return all names that ``name`` may be a misspelling or part of, the nearest first."""
    wanted = name.lower()
    ratios = {each: difflib.SequenceMatcher(None, wanted, each.lower()).ratio() for each in names}
    nearest = max(ratios.values(), default=0.0)
    near = [each for each, ratio in ratios.items() if ratio >= max(0.7, nearest - 0.08)]
    parts = [each for each in ratios if each not in near and _is_part(wanted, each.lower())]
    return sorted(near, key=lambda each: -ratios[each])[:MOST_NAMES] + parts[:MOST_NAMES]


def near_hint(name: str, names: Iterable[str], *, others: Iterable[str] = (), prefix: str = "") -> str:
    """Return ``did you mean a, b or c?`` with `near_names`, or an empty text if there are none.

    Args:
        others: names to suggest besides.
        prefix: put before each name.
    """
    *first, last = dict.fromkeys(prefix + each for each in [*near_names(name, names), *others]) or [""]
    return f"did you mean {', '.join(first)}{' or ' * bool(first)}{last}?" if last else ""


def _is_part(one: str, other: str) -> bool:
    return min(len(one), len(other)) > 2 and (one in other or other in one)
