"""Check that mmengine, mmcv and mmseg are installed once each; two families of distributions provide them."""

import warnings
from contextlib import redirect_stdout
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from io import StringIO

# import name: (onedl's distribution, OpenMMLab's distributions)
FAMILIES = {
    'mmengine': ('onedl-mmengine', ('mmengine', 'mmengine-lite')),
    'mmcv': ('onedl-mmcv', ('mmcv', 'mmcv-lite')),
    'mmseg': ('onedl-mmsegmentation', ('mmsegmentation',)),
}
INSTALL = f'pip install {" ".join(maintained for maintained, _ in FAMILIES.values())}'


def why_not_usable() -> str | None:
    """Return the command that repairs missing or conflicting mm packages in one sentence, or None if all is well."""
    for maintained, others in FAMILIES.values():
        doubled = [name for name in others if _installed(name)]
        if _installed(maintained) and doubled:
            everything = ' '.join([n for m, o in FAMILIES.values() for n in (m, *o) if _installed(n)])
            return (
                f'{maintained} and {doubled[0]} are both installed and overwrite each other; type: '
                f'pip uninstall -y {everything} && {INSTALL}'
            )
    missing = [name for name in FAMILIES if find_spec(name) is None]
    if missing:
        return f'mmseg_volo needs {", ".join(missing)}, not installed here; type: {INSTALL}'
    return None


def require_one_stack() -> None:
    """Import the mm packages without their messages; raises ``ImportError`` if they are not usable."""
    reason = why_not_usable()
    if reason is not None:
        raise ImportError(reason)
    # mmcv warns about missing operators, and mmseg prints about a cloud service; neither is used here.
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter('ignore')
        for name in ('mmcv.cnn', 'mmseg.datasets', 'mmseg.models'):
            import_module(name)


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
