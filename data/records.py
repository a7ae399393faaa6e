"""Records of the inputs: JSON lines, rows and text files, and the documents in them.

No record is skipped silently: one that is not a document raises an error that names its place.
"""

from typing import NamedTuple

import orjson

from ..text import decoded, not_utf8

# The largest line, text file or text of a row. Reading and tokenizing one of this size needs about
# 1.3 GB in all processes together.
MAX_DOCUMENT_BYTES = 2**27
TEXT_KEY = "text"


class Document(NamedTuple):
    text: str
    set_name: str


class JsonLine(NamedTuple):
    """One line of a JSON-lines file, ``{"text": …, "meta": {"pile_set_name": …}}``."""

    place: str
    set_name: str
    line: bytes
    text_key: str = TEXT_KEY

    @property
    def num_bytes(self) -> int:
        return len(self.line)

    def document(self) -> Document:
        try:
            row = orjson.loads(self.line)
        except orjson.JSONDecodeError as error:
            if reason := not_utf8(self.line):
                raise ValueError(
                    f"{self.place}: not UTF-8 ({reason}); convert the file to UTF-8, or remove this line"
                ) from None
            raise ValueError(
                f"{self.place}: not valid JSON ({error}); fix or remove this line, each must be one record"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{self.place}: not a JSON object but a {type(row).__name__}; fix or remove this line")
        return _document_of(row, self)


class Row(NamedTuple):
    """One row of a parquet file or a Hub data set, with the same fields."""

    place: str
    set_name: str
    row: dict
    text_key: str = TEXT_KEY

    @property
    def num_bytes(self) -> int:
        text = self.row.get(self.text_key)
        if not isinstance(text, str):
            return 0
        return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))

    def document(self) -> Document:
        return _document_of(self.row, self)


class TextFile(NamedTuple):
    """One text file, which is one document unless it is empty (such as ``__init__.py``)."""

    place: str
    set_name: str
    content: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.content)

    def document(self) -> Document | None:
        text = decoded(self.content, self.place, "remove it from the inputs")
        return Document(text, self.set_name) if text else None


Record = JsonLine | Row | TextFile


def _document_of(row: dict, record: JsonLine | Row) -> Document:
    key, set_name = record.text_key, record.set_name
    text, meta = row.get(key), row.get("meta")
    if not isinstance(text, str) or not text:
        found = "is empty" if text == "" else f"is of type {type(text).__name__}" if key in row else "is missing"
        remedy = "fix or remove it" if key in row else "fix or remove it, or name another key with --text-key"
        raise ValueError(f'{record.place}: the record has no text (key "{key}" {found}); {remedy}')
    if isinstance(meta, dict) and isinstance(meta.get("pile_set_name"), str):
        set_name = meta["pile_set_name"]
    return Document(text, set_name)


def too_large(place: str, num_bytes: int) -> ValueError:
    """Return the error for a document above the limit."""
    return ValueError(
        f"{place}: a document of {num_bytes:,} bytes or more; the limit is {MAX_DOCUMENT_BYTES:,}: split or remove it"
    )
