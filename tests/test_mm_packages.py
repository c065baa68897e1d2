import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmseg_volo import _mm_packages

ROOT = Path(__file__).parents[1]
ONEDL = ('onedl-mmengine', 'onedl-mmcv', 'onedl-mmsegmentation')
INSTALL = f'pip install {" ".join(ONEDL)}'
OPENMMLAB = ('mmengine', 'mmcv', 'mmsegmentation')


@pytest.fixture
def machine(monkeypatch):
    """Pretend that these distributions are installed and that these modules cannot be imported."""

    def pretend(installed=ONEDL, missing=()):
        monkeypatch.setattr(_mm_packages, '_installed', lambda name: name in installed)
        monkeypatch.setattr(_mm_packages, 'find_spec', lambda name: None if name in missing else object())

    return pretend


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize('installed', [ONEDL, OPENMMLAB, ('mmengine', 'mmcv-lite', 'mmsegmentation')], ids=str)
def test_one_family_is_usable(machine, installed):
    machine(installed)
    assert _mm_packages.why_not_usable() is None


@pytest.mark.parametrize('missing', [['mmseg'], ['mmcv'], ['mmengine', 'mmcv', 'mmseg']], ids=str)
def test_missing_packages_are_named_with_what_to_type(machine, missing):
    machine(missing=missing)
    assert _mm_packages.why_not_usable() == (
        f'mmseg_volo needs {", ".join(missing)}, not installed here; type: {INSTALL}'
    )


@pytest.mark.parametrize('second', ['mmengine', 'mmengine-lite', 'mmcv', 'mmcv-lite', 'mmsegmentation'])
def test_two_families_over_each_other_are_named_with_what_to_type(machine, second):
    machine((*ONEDL, second))
    first = next(ours for ours, theirs in _mm_packages.FAMILIES.values() if second in theirs)
    sentence = _mm_packages.why_not_usable()
    assert sentence.startswith(f'{first} and {second} are both installed and overwrite each other; type: ')
    uninstalled = re.search(rf'pip uninstall -y (.*) && {INSTALL}$', sentence)[1].split()
    assert sorted(uninstalled) == sorted((*ONEDL, second))  # uninstalling one breaks files of the other


def test_two_families_side_by_side_are_left_alone(machine):
    machine(('onedl-mmengine', 'mmcv-lite', 'onedl-mmsegmentation'))  # nothing is overwritten
    assert _mm_packages.why_not_usable() is None


def test_an_unusable_stack_is_an_import_error_with_that_sentence(machine):
    machine(missing=['mmcv'])
    with pytest.raises(ImportError) as error:
        _mm_packages.require_one_stack()
    assert str(error.value) == _mm_packages.why_not_usable()


def test_installed_asks_for_distributions_not_for_import_names():
    assert _mm_packages._installed('torch')
    assert not _mm_packages._installed('mmseg')  # the import name of mmsegmentation
    assert not _mm_packages._installed('no-such-distribution')


def test_importing_says_nothing():
    result = python('import mmseg_volo; assert mmseg_volo.VOLO')
    assert (result.returncode, result.stdout, result.stderr) == (0, '', '')


def test_chatter_of_others_is_silenced_for_the_import_only():
    result = python(
        'import sys, warnings, mmseg_volo; print("heard"); warnings.simplefilter("default"); warnings.warn("seen")'
    )
    assert result.stdout == 'heard\n' and 'seen' in result.stderr and result.returncode == 0


HIDE = """
import sys
from importlib.machinery import PathFinder

class Hide(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition('.')[0] in {hidden} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hide
import mmseg_volo
"""


@pytest.mark.parametrize('hidden', [['mmseg'], ['mmengine', 'mmcv', 'mmseg']], ids=str)
def test_importing_without_the_mm_packages_says_in_one_sentence_what_to_type(hidden):
    result = python(HIDE.format(hidden=hidden))
    assert result.returncode == 1 and result.stdout == ''
    assert result.stderr.splitlines()[-1] == (
        f'ImportError: mmseg_volo needs {", ".join(hidden)}, not installed here; type: {INSTALL}'
    )
    assert 'During handling' not in result.stderr  # our sentence instead of the ImportError
