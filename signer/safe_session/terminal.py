"""Text on a terminal of a certain width: lines are broken between words, tables between columns. Pure but for
`width_of`; imports nothing but `os`, since `safe-session` uses it.

Text that no terminal shows stays as it is, so that programs find a row on one line and transcripts are the same
everywhere.
"""

from __future__ import annotations

import os

MAX_WIDTH = 100  # columns; longer lines are harder to read
MIN_WIDTH = 30
_USUAL_WIDTH = 80  # where the terminal does not say
_NARROWEST = 24  # columns of a cell that is broken into lines
_GAP = "  "  # between columns
_HANG = 4  # columns by which what does not fit beside a name is moved in
_DEEP = 8  # blanks before a text that belongs to the name above it
_COMMANDS = ("  signer ", "  safe-session ", "  scripts/")  # how examples begin
_CLOSING = {"`": "`", "[": "]"}


def width_of(descriptor: int) -> int | None:
    """The columns to use of the terminal behind a descriptor; None if no terminal is there. COLUMNS counts first."""
    try:
        if not os.isatty(descriptor):
            return None
        stated = os.environ.get("COLUMNS", "")
        columns = int(stated) if stated.isascii() and stated.isdecimal() else 0
        columns = columns or os.get_terminal_size(descriptor).columns or _USUAL_WIDTH
    except (OSError, ValueError):
        return None
    return within(columns)


def within(columns: int) -> int:
    """How many columns to use of a terminal that has so many."""
    return max(MIN_WIDTH, min(columns, MAX_WIDTH))


# --- lines ------------------------------------------------------------------------------------------------------------


def wrap(line: str, width: int, hang: int | None = None) -> list[str]:
    """`line` in lines of `width` columns at most; longer only where one word is.

    `hang` is the indent of all lines but the first; by default below the text where the line has a name, two or more
    blanks and a text, else two columns more than the first line has. A command between backticks and a part of a
    usage line between brackets stay whole where they fit.
    """
    if len(line) <= width:
        return [line]
    indent = _indent(line)
    column = _text_column(line)
    if column and width - column < _NARROWEST and hang is None:  # no room beside the name
        own = indent + _HANG
        return [*wrap(line[:column].rstrip(), width, own), *wrap(" " * own + line[column:], width, own)]
    if hang is None:
        hang = column or indent + 2
    lines: list[str] = []
    current = " " * indent
    is_empty = True
    for gap, word in _words(line[indent:], width - hang):
        if not is_empty and len(current) + len(gap) + len(word) > width:
            lines.append(current)
            current = " " * hang + word
        else:
            current += gap + word
        is_empty = False
    return [*lines, current]


def wrap_command(line: str, width: int) -> list[str]:
    """A command line for a shell in lines that end with a backslash, so that it can be pasted; a word and an
    option with its value stay whole."""
    if len(line) <= width:
        return [line]
    indent = _indent(line)
    words: list[str] = []
    is_quoted = follows_option = False
    for word in line[indent:].split(" "):
        if is_quoted or (follows_option and not word.startswith("-")):
            words[-1] += f" {word}"
        else:
            words.append(word)
        is_quoted ^= (word.count("'") + word.count('"')) % 2 == 1
        follows_option = word.startswith("--") and "=" not in word
    lines: list[str] = []
    current = " " * indent + words[0]
    for word in words[1:]:
        if len(current) + len(word) + 3 > width:
            lines.append(f"{current} \\")
            current = " " * (indent + _HANG) + word
        else:
            current += f" {word}"
    return [*lines, current]


def fit(text: str, width: int) -> str:
    """A text of several lines, as help is, at `width` columns.

    Only a paragraph with a line that is too long is laid out again: lines without indent that follow each other, or a
    row of a name and a text with the lines below that text.
    """
    return "\n".join(line for block in _blocks(text.split("\n"), width) for line in block)


def _blocks(lines: list[str], width: int) -> list[list[str]]:
    found: list[list[str]] = []
    at = 0
    while at < len(lines):
        end = at + 1
        following = _following(lines[at])
        while following is not None and end < len(lines) and _goes_on(lines[end], following):
            end += 1
        block = lines[at:end]
        if max(map(len, block)) > width:
            block = _laid_out(" ".join([block[0], *(line.strip() for line in block[1:])]), width)
        found.append(block)
        at = end
    return found


def _following(line: str) -> int | None:
    """The indent of the lines that belong to the same paragraph; None for a line that stands for itself."""
    if not line.strip():
        return None
    if line.startswith("usage: "):
        return line.find("[") if "[" in line else None
    return _text_column(line) or (_indent(line) if _indent(line) in (0, *range(_DEEP, MAX_WIDTH)) else None)


def _goes_on(line: str, indent: int) -> bool:
    return bool(line.strip()) and _indent(line) == indent and not _text_column(line) and not line.startswith("- ")


def _laid_out(line: str, width: int) -> list[str]:
    """One paragraph, given as a line, at `width` columns."""
    if line.startswith(_COMMANDS) and not _text_column(line):
        return wrap_command(line, width)
    if line.startswith("usage: "):
        return wrap(line, width, len("usage: ") + 2)
    indent = _indent(line)
    if indent >= _DEEP and not _text_column(line):  # the text of a name that has the line before
        indent = indent if width - indent >= _NARROWEST else _HANG + 2
        return wrap(" " * indent + line.strip(), width, indent)
    if indent == 0 and not _text_column(line):
        return wrap(line, width, 2 if line.startswith("- ") else 0)
    return wrap(line, width)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _text_column(line: str) -> int:
    """Where the text begins in a row of a name, two or more blanks and a text; 0 for another line."""
    indent = _indent(line)
    gap = line.find(_GAP, indent)
    return gap + _indent(line[gap:]) if 0 <= gap < len(line.rstrip(" ")) else 0


def _words(text: str, room: int) -> list[tuple[str, str]]:
    """(the blanks before it, the word) of each word; several words between backticks or brackets are one if they fit
    into `room` columns."""
    found: list[tuple[str, str]] = []
    gap, parts, at = "", text.split(" "), 0
    while at < len(parts):
        word = parts[at]
        at += 1
        if not word:
            gap += " "
            continue
        if closing := _CLOSING.get(word.lstrip("(")[:1]):
            whole, end = word, at
            while closing not in whole.lstrip("(")[1:] and end < len(parts) and len(whole) <= room:
                whole += f" {parts[end]}"
                end += 1
            if closing in whole.lstrip("(")[1:] and len(whole) <= room:
                word, at = whole, end
        found.append((gap, word))
        gap = " "
    return found


# --- tables -----------------------------------------------------------------------------------------------------------


def lay_out(rows: list[list[str]], width: int | None, indent: str = "", *, titled: bool = False) -> list[str]:
    """The lines of a table whose columns are as wide as their widest cell; `titled` if the first row has titles.

    Where that is wider than `width`, cells with several words are broken into lines; where that is not enough, each row
    takes several lines, and so do the titles. Nothing is left out. `width` is None for no limit.
    """
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if width is None or _total(widths, indent) <= width:
        return [_join(row, widths, indent) for row in rows]
    if narrowed := _narrow(rows, widths, width - len(indent), titled=titled):
        return [line for row in rows for line in _broken(row, narrowed, indent)]
    longest = max(len(word) for row in rows for word in row[-1].split(" "))
    widths[-1] = min(widths[-1], max(_NARROWEST, longest))  # its text may take several lines
    groups = _groups(widths, width - len(indent))
    return [line for row in rows for line in _folded(row, widths, groups, width, indent)]


def _total(widths: list[int], indent: str) -> int:
    return len(indent) + sum(widths) + len(_GAP) * (len(widths) - 1)


def _join(cells: list[str], widths: list[int], indent: str) -> str:
    return (indent + _GAP.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))).rstrip()


def _narrow(rows: list[list[str]], widths: list[int], room: int, *, titled: bool) -> list[int]:
    """Widths of the columns that fit into `room`, the widest ones reduced first; none if words would be broken.

    The last column of a table without titles may hold longer words: its row then has it on lines of its own.
    """
    least = []
    for place, column in enumerate(zip(*rows, strict=True)):
        longest = max((len(word) for cell in column for word in cell.split(" ")), default=0)
        is_free = place == len(widths) - 1 and not titled
        title = len(column[0]) if titled else 0
        least.append(min(widths[place], max(_NARROWEST, title, 0 if is_free else longest)))
    found = list(widths)
    while (over := _total(found, "") - room) > 0:
        spare = [now - low for now, low in zip(found, least, strict=True)]
        if not any(spare):
            return []
        place = max((n for n, some in enumerate(spare) if some), key=found.__getitem__)
        others = [now for n, now in enumerate(found) if n != place and spare[n]]
        step = max(found[place] - max(others, default=0), 1)
        found[place] -= min(step, spare[place], over)
    return found


def _broken(row: list[str], widths: list[int], indent: str) -> list[str]:
    """A row whose cells are broken into lines, side by side."""
    lines = [wrap(cell, width, 0) for cell, width in zip(row, widths, strict=True)]
    if max(map(len, lines[-1])) > widths[-1]:  # a long word in the last cell
        own = indent + " " * _HANG
        width = _total(widths, "")
        first = _broken([*row[:-1], ""], widths, indent)
        return [*first, *(own + line for line in wrap(row[-1], width - _HANG, 0))]
    height = max(map(len, lines))
    cells = [[*cell, *[""] * (height - len(cell))] for cell in lines]
    return [_join(list(line), widths, indent) for line in zip(*cells, strict=True)]


def _groups(widths: list[int], room: int) -> list[int]:
    """How many columns each line of a folded row takes."""
    counts, used = [0], 0
    for width in widths:
        added = width + (len(_GAP) if counts[-1] else 0)
        if counts[-1] and used + added > room:
            counts.append(0)
            used, added = _HANG, width
        counts[-1] += 1
        used += added
    return counts


def _folded(row: list[str], widths: list[int], groups: list[int], width: int, indent: str) -> list[str]:
    """A row in several lines: as many columns as fit, and the others below them, moved in."""
    lines: list[str] = []
    at = 0
    for count in groups:
        own = indent if at == 0 else indent + " " * _HANG
        cells, widest = row[at : at + count], widths[at : at + count]
        line = _join(cells, widest, own)
        hang = len(own) + _total(widest[:-1], _GAP) if count > 1 else len(own)
        lines += wrap(line, width, hang) if line.strip() else []
        at += count
    return lines
