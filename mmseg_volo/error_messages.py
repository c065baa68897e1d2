"""How exceptions reach the user: a mistake is one sentence on stderr with exit status 2, a defect is a traceback."""

import errno
import inspect
import os
import re
import sys
import textwrap
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from io import TextIOWrapper
from pathlib import Path
from types import CodeType, FrameType

from mmengine.model import BaseModule
from mmengine.registry import build_from_cfg
from mmengine.runner import Runner
from torch import nn
from torch.distributed import DistError, PrefixStore, TCPStore

from .errors import UserError

PACKAGE = Path(__file__).parent
LONGEST = 400  # characters of another library's message, some of which quote whole configs
DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
NAMES = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
# How gloo, NCCL and torch's store report that another process has ended or no longer answers.
LOST_PEER = re.compile(
    r'(connection|pair) (was likely )?clos(ed|ure)|peer closed|closed by (remote )?peer|connection reset|broken pipe'
    r'|remote process exit|process exiting prematurely|communicator was aborted'
    r'|timed out waiting|timeout caused pair closure|wait timeout|collective operation timeout',
    re.IGNORECASE,
)
LOST_PEER_SENTENCE = 'another process of this run ended or stopped answering; its output or the launcher says why'
# What a data-loader worker puts before the message of an exception.
IN_WORKER = re.compile(r'Caught UserError in DataLoader worker.*\bUserError: ', re.DOTALL)
SHOW = '(MMSEG_VOLO_TRACEBACK=1 shows where)'


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Turn a user's mistake into ``error: <sentence>`` and exit status 2, and Ctrl-C into status 130.

    A mistake is a ``UserError``, a full or read-only disk, an impossible path, a failure of ``torch.distributed``, or
    an exception that mmengine meets while it builds objects from the config. Any other exception is a defect, and so is
    one raised by a line of this package: it keeps its traceback. ``MMSEG_VOLO_TRACEBACK=1`` keeps all tracebacks.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # file names need not be valid text
    try:
        yield
    except Exception as error:
        lost_peer = _lost_peer(error)
        sentence = f'{LOST_PEER_SENTENCE} ({_first_line(error)})' if lost_peer else _sentence(error)
        if sentence is None or os.environ.get('MMSEG_VOLO_TRACEBACK') == '1':
            raise
        if lost_peer:
            time.sleep(1)  # the launcher blames the process that it sees end first
        if _is_first_to_say(sentence, lost_peer):
            print('error:', ' '.join(sentence.splitlines()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)


def _lost_peer(error: Exception) -> bool:
    """Whether this process can only report that another one is gone."""
    distributed = isinstance(error, DistError) or 'gloo/transport' in str(error)
    return distributed and LOST_PEER.search(str(error)) is not None


def _first_line(error: Exception) -> str:
    return textwrap.shorten(str(error).strip().partition('\n')[0], LONGEST)


def _sentence(error: Exception) -> str | None:
    """The user's mistake in one sentence, or None for a defect."""
    if isinstance(error, UserError):
        return IN_WORKER.sub('', str(error))
    if isinstance(error, OSError) and error.errno in DISKS + NAMES:
        return f'{error.strerror}: {error.filename or "while writing"}'
    if isinstance(error, DistError):
        message = str(error).partition('Exception raised from')[0]  # without the stack of C++ functions
        return f'torch.distributed failed: {type(error).__name__}: {textwrap.shorten(message, 2 * LONGEST)} {SHOW}'
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if frames[-1].f_code is nn.Module.__getattr__.__code__:  # the line that asked for the attribute is at fault
        frames.pop()
    if not any(frame.f_code in _builders() for frame in frames) or _is_ours(error, frames[-1]):
        return None
    built = [frame.f_locals['cfg'] for frame in frames if frame.f_code is build_from_cfg.__code__]
    types = [cfg['type'] for cfg in built if isinstance(cfg, dict) and 'type' in cfg]
    where = ''.join(f'{getattr(kind, "__name__", kind)}: ' for kind in types)
    reason = textwrap.shorten(f'{type(error).__name__}: {error}', LONGEST)
    return f'the config cannot be used: {where}{reason} {SHOW}'


def _is_ours(error: Exception, frame: FrameType) -> bool:
    """Whether a line of this package is at fault, and not an argument that a constructor of ours only passes on."""
    passed_on = frame.f_code.co_flags & inspect.CO_VARKEYWORDS and 'argument' in str(error)
    if isinstance(error, TypeError) and frame.f_code.co_name == '__init__' and passed_on:
        return False
    return PACKAGE in Path(frame.f_code.co_filename).parents


def _is_first_to_say(sentence: str, lost_peer: bool) -> bool:
    """Whether no other process of this run has said ``sentence`` or, to one that lost a peer, anything at all."""
    if os.environ.get('WORLD_SIZE', '1') == '1':
        return True
    try:
        address, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        said = PrefixStore(f'said {os.environ.get("TORCHELASTIC_RESTART_COUNT")}', store)
        first = said.add('anything', 1) == 1
        return said.add(sentence, 1) == 1 and (first or not lost_peer)
    except (KeyError, DistError):  # no process is left to ask
        return True


def _builders() -> set[CodeType]:
    """The functions with which mmengine builds and sets up objects from a config."""
    methods = [method for name, method in vars(Runner).items() if name.startswith(('build_', 'from_cfg', 'scale_lr'))]
    functions = (build_from_cfg, BaseModule.init_weights, *methods)
    return {getattr(function, '__func__', function).__code__ for function in functions}
