"""How a user's mistake reaches the user: one sentence on stderr, exit status 2, no traceback."""

import errno
import os
import sys
import textwrap
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from io import TextIOWrapper
from types import CodeType

from mmengine.model import BaseModule
from mmengine.registry import build_from_cfg
from mmengine.runner import Runner
from torch.distributed import DistError, PrefixStore, TCPStore

from .errors import UserError

LONGEST = 400  # characters of what others say; some of it quotes whole configs
DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
NAMES = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
LEFT_ALONE = 'another process of this run ended, so this one cannot go on; that one or the launcher says why'


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Turn a user's mistake into ``error: <sentence>`` and status 2, and Ctrl-C into 130.

    A user's mistake is a ``UserError``, a full or read-only disk, a path that cannot be, and whatever is raised while
    mmengine builds something from the config. ``MMSEG_VOLO_TRACEBACK=1`` leaves its traceback as it is.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # the names of files may be no text
    try:
        yield
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None or os.environ.get('MMSEG_VOLO_TRACEBACK') == '1':
            raise
        if _first_to_say(sentence):
            print('error:', ' '.join(sentence.splitlines()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)


def _sentence(error: Exception) -> str | None:
    """What the user did wrong, or None for a defect."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISKS + NAMES:
        return f'{error.strerror}: {error.filename or "while writing"}'
    if isinstance(error, DistError) or 'gloo/transport' in str(error):
        time.sleep(1)  # the launcher names, and ends the run for, the process that it sees die first
        return LEFT_ALONE
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not any(frame.f_code in _builders() for frame in frames):
        return None
    built = [frame.f_locals['cfg'] for frame in frames if frame.f_code is build_from_cfg.__code__]
    types = [cfg['type'] for cfg in built if isinstance(cfg, dict) and 'type' in cfg]
    where = ''.join(f'{getattr(kind, "__name__", kind)}: ' for kind in types)
    reason = textwrap.shorten(f'{type(error).__name__}: {error}', LONGEST)
    return f'the config cannot be used: {where}{reason} (MMSEG_VOLO_TRACEBACK=1 shows where)'


def _first_to_say(sentence: str) -> bool:
    """Whether no other process of this run has said so, or why it left this one alone."""
    if os.environ.get('WORLD_SIZE', '1') == '1':
        return True
    try:
        address, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        said = PrefixStore(f'said {os.environ.get("TORCHELASTIC_RESTART_COUNT")}', store)
        first = said.add('anything', 1) == 1
        return said.add(sentence, 1) == 1 and (first or sentence != LEFT_ALONE)
    except (KeyError, DistError):  # nobody is left to ask
        return True


def _builders() -> set[CodeType]:
    """The functions of mmengine that make objects of a config's values, or set them up with these."""
    methods = [method for name, method in vars(Runner).items() if name.startswith(('build_', 'from_cfg', 'scale_lr'))]
    functions = (build_from_cfg, BaseModule.init_weights, *methods)
    return {getattr(function, '__func__', function).__code__ for function in functions}
