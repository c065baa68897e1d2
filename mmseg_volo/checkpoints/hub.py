"""Models on the Hugging Face hub, or in a folder of the same files. Only safetensors and JSON are read from them."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from .plain_config import parsed_config
from .wording import first_sentence

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'
LARGEST = {WEIGHTS: 2**35, CONFIG: 2**20}  # bytes
SOURCE = re.compile(r'hf://([\w.-]+/[\w.-]+?)(?:@(?!.*\.\.)(\w[\w./-]*))?')


class FileMissing(UserError):
    """A model lacks a file."""


def is_model(source: str) -> bool:
    """Whether ``source`` is ``hf://owner/name`` or a folder: it tells config and weights."""
    return source.startswith('hf://') or os.path.isdir(source)


def repository(source: str) -> tuple[str, str | None]:
    """``owner/name`` and the revision in ``source``; raises ``UserError`` for another form."""
    match = SOURCE.fullmatch(source)
    if match is None:
        raise UserError(f'a model on the hub is hf://owner/name or hf://owner/name@revision, got {source}')
    return match[1], match[2]


def model_file(source: str, name: str) -> Path:
    """Path of the file ``name`` of a model, downloaded into huggingface_hub's cache where needed.

    Args:
        source: ``hf://owner/name``, which may end in ``@revision``, or a folder.
        name: ``WEIGHTS`` or ``CONFIG``.

    Raises:
        UserError: it does not exist, cannot be reached, or is larger than allowed.
    """
    if source.startswith('hf://'):
        path = _downloaded(source, name)
    else:
        path = Path(source, name)
        if not path.is_file():
            raise FileMissing(f'{source} has no {name}; mmseg-volo push writes such folders')
    _check_size(source, name, path.stat().st_size)
    return path


def model_config(source: str) -> tuple[dict | None, str]:
    """Content of a model's ``config.json``, and the source of the weights that belong to it.

    Args:
        source: as for ``model_file``.

    Returns:
        Checked content, None if there is no such file or another library wrote it; and ``source`` at the commit from
        which it was read.

    Raises:
        UserError: as for ``model_file``, or the content is refused.
    """
    try:
        path = model_file(source, CONFIG)
    except FileMissing:
        return None, source
    content = parsed_config(path.read_bytes(), f'{CONFIG} of {source}')
    if not source.startswith('hf://'):
        return content, source
    return content, f'hf://{repository(source)[0]}@{path.parent.name}'  # the cache has a folder per commit


def _downloaded(source: str, name: str) -> Path:
    import huggingface_hub as hub

    repo, revision = repository(source)
    with explained(source, f'{name} cannot be read'):
        if revision and re.fullmatch('[0-9a-f]{40}', revision):  # a commit, whose files never change
            cached = hub.try_to_load_from_cache(repo, name, revision=revision)
            if isinstance(cached, str):
                return Path(cached)
        try:
            size = hub.get_hf_file_metadata(hub.hf_hub_url(repo, name, revision=revision)).size
        except Exception as error:
            if isinstance(error, hub.errors.HfHubHTTPError) and error.response.status_code < 500:
                raise
            try:  # without a network, an older copy will do; the hub's own attempts take half a minute
                return Path(hub.hf_hub_download(repo, name, revision=revision, local_files_only=True))
            except hub.errors.LocalEntryNotFoundError:
                offline = isinstance(error, hub.errors.OfflineModeIsEnabled)
                why = 'HF_HUB_OFFLINE is set' if offline else f'the hub cannot be reached ({first_sentence(error)})'
            raise UserError(
                f'{source}: {name} is not in the cache, and {why}; docs/hub.md says how to fill the cache'
            ) from None
        _check_size(source, name, size or 0)
        return Path(hub.hf_hub_download(repo, name, revision=revision))


def _check_size(source: str, name: str, size: int) -> None:
    if size > LARGEST[name]:
        raise UserError(f'{source} is refused: its {name} has {size} bytes, more than {LARGEST[name]}')


@contextmanager
def explained(source: str, what: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a ``UserError``: ``what`` cannot be done, and what to check."""
    from huggingface_hub import errors

    repo, revision = repository(source)
    kind: type[UserError] = UserError
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError:
        reason = 'its users must agree to terms first: open its page on the hub, then log in (hf auth login)'
    except errors.RevisionNotFoundError:
        reason = f'it has no revision {revision!r}; its page on the hub lists branches, tags and commits'
    except errors.RepositoryNotFoundError:
        reason = (
            f'the hub has no model {repo}, or it is private; check the spelling, and for private models log in '
            '(hf auth login, or the environment variable HF_TOKEN)'
        )
    except errors.EntryNotFoundError:
        reason, kind = f'it has no such file; only {WEIGHTS} and {CONFIG} are read', FileMissing
    except errors.HFValidationError:
        reason = 'the hub does not allow such names'
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        denied = '; your token does not allow it: log in with another (hf auth login, or HF_TOKEN)'
        reason = f'the hub answers {status}{denied if status in (401, 403) else f" ({first_sentence(error)})"}'
    except Exception as error:  # huggingface_hub passes on many kinds: proxies, certificates, full disks
        reason = _cause(error)
    else:
        return
    raise kind(f'{source}: {what}: {reason}') from None


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_sentence(error)
