"""How a user's mistake reaches the user: one sentence on stderr, exit status 2, no traceback."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake that one sentence, naming the value and the way out, can explain."""


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Turn a ``UserError``, or a full or read-only disk, into ``error: <sentence>`` and status 2; Ctrl-C into 130."""
    try:
        yield
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        print(f'error: {error.strerror}: {error.filename or "while writing"}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)
