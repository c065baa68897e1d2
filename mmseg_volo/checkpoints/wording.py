"""Parts of messages about checkpoints, safe to print to a terminal."""


def some(keys: list[str], most: int = 5) -> str:
    """List the first ``most`` keys, and the number of the others."""
    return ', '.join(printable(key) for key in keys[:most]) + (
        f' and {len(keys) - most} more' if len(keys) > most else ''
    )


def first_sentence(error: BaseException) -> str:
    """First sentence of an exception's message."""
    return printable((str(error) or type(error).__name__).splitlines()[0].split('. ')[0])


def printable(text: str, most: int = 300) -> str:
    """``text`` with control characters replaced, which a hostile file may contain to confuse a terminal."""
    return ''.join(character if character.isprintable() else '?' for character in text[:most])
