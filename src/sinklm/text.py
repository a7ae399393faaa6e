"""Text from outside in messages: file names, error texts of libraries, generated text."""

LONGEST = 400  # characters of a quoted error text

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
