"""Parts of messages about checkpoints, safe to print on a terminal."""


def some(keys: list[str], most: int = 5) -> str:
    return ', '.join(printable(key) for key in keys[:most]) + (
        f' and {len(keys) - most} more' if len(keys) > most else ''
    )


def first_sentence(error: Exception) -> str:
    return printable((str(error) or type(error).__name__).splitlines()[0].split('. ')[0])


def printable(text: str, most: int = 300) -> str:
    """``text`` without what a file's author might send to a terminal."""
    return ''.join(character if character.isprintable() else '?' for character in text[:most])
