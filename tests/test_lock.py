"""constraints.txt covers setup.cfg, and the script that keeps it notices when it does not."""

import importlib.util
import re

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location('lock', ROOT / '.ci/lock.py')
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)


def test_the_file_covers_every_extra():
    assert list(lock.direct_problems()) == []  # newer or older versions may be installed and need other packages
    assert {'onedl', 'dev'} <= set(lock.extras())


@pytest.mark.parametrize(
    ('pattern', 'replacement', 'sentence'),
    [
        (r'timm==.*\n', '', 'constraints.txt for Python 3.13 must have one version of timm, got none'),
        (r'timm==', 'timm==0.9\ntimm==', r"must have one version of timm, got \['0.9', '1"),
        (r'timm==.*', 'timm==1.0.8', 'has timm 1.0.8, but timm>=1.0.9 is needed'),
        (r'networkx==(.*) ; python_version >= "3.11"\n', '', 'for Python 3.11 must have one version of networkx'),
    ],
)
def test_a_missing_doubled_or_wrong_version_is_found(tmp_path, monkeypatch, pattern, replacement, sentence):
    text = re.sub(pattern, replacement, lock.FILE.read_text())
    (tmp_path / 'constraints.txt').write_text(text)
    monkeypatch.setattr(lock, 'FILE', tmp_path / 'constraints.txt')
    environment = {**lock.default_environment(), 'python_version': '3.11', 'python_full_version': '3.11.9'}
    monkeypatch.setattr(lock, 'default_environment', lambda: environment)
    assert any(re.search(sentence, problem) for problem in lock.problems())


@pytest.mark.parametrize(
    ('theirs', 'ours'),
    [
        ("a==1 ; python_full_version < '3.14' and sys_platform == 'linux'", 'a==1'),
        ("a==1 ; python_full_version < '3.11' and sys_platform == 'linux'", 'a==1 ; python_version < "3.11"'),
        ("a==1 ; python_full_version < '3.11.5'", 'a==1 ; python_full_version < "3.11.5"'),
        ("a==1 ; os_name == 'nt' or sys_platform == 'win32'", 'a==1 ; os_name == "nt" or sys_platform == "win32"'),
        ('a==1', 'a==1'),
    ],
)
def test_markers_keep_what_differs_between_pythons(theirs, ours):
    assert lock.shortened(theirs) == ours
