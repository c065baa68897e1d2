"""How a user's mistake reaches the user: one sentence on stderr, exit status 2, no traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake that one sentence, naming the value and the way out, can explain."""


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Turn a ``UserError`` into ``error: <sentence>`` and exit status 2, and Ctrl-C into status 130."""
    try:
        yield
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)
