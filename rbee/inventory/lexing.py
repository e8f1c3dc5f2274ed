"""How OpenSSH reads a line and matches a name (ssh_config(5); readconf.c, misc.c, match.c of OpenSSH 9.2 to 10)."""

from __future__ import annotations

WHITESPACE = " \t\r\n"


def split_line(line: str) -> tuple[str, str] | None:
    """Return a line's lower-case keyword and the rest, or None where there is nothing to read.

    Raises: ValueError.
    """
    # A form feed may end a line, but not begin it.
    text = line[:1] + line[1:].rstrip(WHITESPACE + "\f")
    if not text.strip(WHITESPACE) or text.lstrip(WHITESPACE).startswith("#"):
        return None
    keyword, rest = _delimited(text)
    if not keyword and rest is not None:
        keyword, rest = _delimited(rest)
    if not keyword:
        return None
    if not rest:
        raise ValueError(f"{keyword!r} has no value")
    return keyword.lower(), rest


def _delimited(text: str) -> tuple[str, str | None]:
    """Return what stands before white space, `=` or in quotes, and what comes after it; one `=` is skipped."""
    end = next((place for place, letter in enumerate(text) if letter in WHITESPACE + '="'), -1)
    if end < 0:
        return text, None
    if text[end] == '"':
        inside, closed, rest = text[end + 1 :].partition('"')
        if not closed:
            raise ValueError("a quote is not closed")
        return text[:end] + inside, rest.lstrip(WHITESPACE)
    rest = text[end + 1 :].lstrip(WHITESPACE)
    if text[end] != "=" and rest.startswith("="):
        rest = rest[1:].lstrip(WHITESPACE)
    return text[:end], rest


def split_words(text: str) -> list[str]:
    r"""Return the words of a value: quotes group, a backslash frees a quote, itself or a space, ` #` begins a comment.

    Raises: ValueError.
    """
    words = []
    place = 0
    while place < len(text):
        if text[place] in " \t":
            place += 1
        elif text[place] == "#":
            break
        else:
            word, place = _word(text, place)
            words.append(word)
    return words


def _word(text: str, place: int) -> tuple[str, int]:
    word, quote = "", ""
    while place < len(text):
        letter = text[place]
        following = text[place + 1 : place + 2]
        if letter == "\\" and following and (following in "'\"\\" or (not quote and following == " ")):
            word += following
            place += 1
        elif not quote and letter in " \t":
            break
        elif not quote and letter in "'\"":
            quote = letter
        elif letter == quote:
            quote = ""
        else:
            word += letter
        place += 1
    if quote:
        raise ValueError("a quote is not closed")
    return word, place


def matches(text: str, pattern: str) -> bool:
    """Tell whether a pattern with `*` and `?` covers the whole text, in time proportional to both lengths."""
    if is_literal(pattern):
        return text == pattern
    place = at = 0
    star, resume = -1, 0
    while place < len(text):
        if at < len(pattern) and pattern[at] == "*":
            star, resume = at, place
            at += 1
        elif at < len(pattern) and pattern[at] in ("?", text[place]):
            place, at = place + 1, at + 1
        elif star >= 0:
            resume += 1
            place, at = resume, star + 1
        else:
            return False
    return all(letter == "*" for letter in pattern[at:])


def in_list(text: str, patterns: str) -> bool:
    """Tell whether a comma-separated list covers the text: no negated pattern does, and another does."""
    found = False
    for pattern in patterns.split(","):
        negated = pattern.startswith("!")
        if matches(text, pattern[1:] if negated else pattern):
            if negated:
                return False
            found = True
    return found


def is_literal(pattern: str) -> bool:
    """Tell whether a pattern has no wildcards, and so stands for itself."""
    return "*" not in pattern and "?" not in pattern
