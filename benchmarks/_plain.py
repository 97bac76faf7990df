"""Pages that show their rows as they are, with the words of `_words.py` for columns, values and sections."""

import re

from _tables import FACTS, Result, dtype_name, failure, length_name, run_of, table, values
from _words import CASES, COLUMNS, HIDDEN, ORDER, SECTIONS, SENTENCES, VALUES, of_page

LENGTHS = ("prompt", "new", "tokens", "keys")
# Fields that hold a tuple or a list as Python prints it.
LISTS = ("options", "segments")


def plain_text(result: Result) -> str:
    """All rows, a table a section."""
    parts, sentences = [], of_page(SENTENCES, result.name)
    first = of_page(SECTIONS, result.name)
    sections = sorted(values(result.rows, "section"), key=lambda name: (*first, name).index(name))
    for section in sections or [None]:
        rows = result.where(section=section).rows if section else result.rows
        parts += [f"## {section.capitalize()}"] if section else []
        parts += [sentences[section]] if section in sentences else []
        parts.append(plain_table(result, rows))
    return "\n\n".join(parts)


def plain_table(result: Result, rows: list[dict]) -> str:
    """One table; where rows stand from several runs, each says which it is of."""
    name, several = result.name, len(values(result.rows, "commit")) > 1
    hidden = {*of_page(HIDDEN, name), *FACTS, "section", "target"}
    shown = [spelled(row) for row in rows]
    order = of_page(ORDER, name) or ()
    shown.sort(key=lambda row: [row.get(field, 0) for field in order])
    found = dict.fromkeys(key for row in shown for key in row if key not in hidden and not failed(row, key))
    names = of_page(COLUMNS, name)
    # Columns that have words stand in the order of those words.
    fields = [field for field in names if field in found] + [field for field in found if field not in names]
    lines = [[*cells(name, row, fields), *([run_of(row)] if several else [])] for row in shown]
    return table([*(names.get(field, field) for field in fields), *(["run"] if several else [])], lines)


def spelled(row: dict) -> dict:
    """The row with the letters of its case as columns: "S65536-B1" is 64K keys and a batch of 1."""
    letters = re.findall(r"([A-Z])(\d+)(?:-|$)", str(row.get("case", "")))
    whole = "-".join(map("".join, letters)) == row.get("case")
    if not whole or any(letter not in CASES for letter, _ in letters):
        return row
    words = {CASES[letter]: int(size) for letter, size in letters}
    return words | {field: value for field, value in row.items() if field != "case"}


def failed(row: dict, field: str = "error") -> bool:
    """Whether the field says what went wrong; the error of a result is a number."""
    return field == "error" and isinstance(row.get("error"), str)


def cells(page: str, row: dict, fields: list[str]) -> list:
    """The values of a row; what went wrong stands in the place of the first that is missing."""
    shown = [cell(page, field, row.get(field)) for field in fields]
    if failed(row):
        missing = next(i for i, field in enumerate(fields) if field not in row)
        shown[missing] = failure(row)
    return shown


def cell(page: str, field: str, value):
    """A value in words: lengths in K, dtypes by their short names, lists without their brackets."""
    if field in LENGTHS and isinstance(value, int):
        return length_name(value)
    if field == "dtype":
        return dtype_name(value)
    if field in LISTS:
        return re.sub(r"[][()']", "", value)
    return of_page(VALUES, page).get(value, value) if isinstance(value, str) else value
