"""README and docs/: what they name exists, and links and anchors have targets."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location('claims', ROOT / 'tools/claims.py')
claims = importlib.util.module_from_spec(spec)
sys.modules['claims'] = claims  # dataclass looks its module up
spec.loader.exec_module(claims)


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(path: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub and MyST make them."""
    text = re.sub(r'^```.*?^```', '', path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r'^#+ (.+)$', text, re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).strip().replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', claims.PAGES, ids=page_id)
def test_what_a_page_names_exists(page):
    assert claims.problems(page.read_text()) == []


@pytest.mark.parametrize(
    'page, problem',
    [
        ('```bash\nmmseg-volo trian volo_d1_camvid\n```', 'there is no command trian: mmseg-volo trian volo_d1_camvid'),
        ('`mmseg-volo train volo_d9_camvid`', 'there is no config volo_d9_camvid: mmseg-volo train volo_d9_camvid'),
        ('see `volo_d9_camvid`', 'there is no config volo_d9_camvid'),
        ('see `configs/volo_d9_camvid.py`', 'there is no configs/volo_d9_camvid.py'),
        ('`mmseg-volo train --sed 1`', 'train has no --sed: mmseg-volo train --sed 1'),
        ('`tests/test_docs.py::test_nothing`', 'tests/test_docs.py has no test_nothing'),
        ('`python tests/soak/nothing.py`', 'there is no tests/soak/nothing.py'),
    ],
)
def test_what_a_page_names_wrongly_is_found(page, problem):
    assert claims.problems(page) == [problem]


def test_versions_other_than_those_of_the_tests_are_listed():
    assert claims.other_versions('torch 2.11.0, timm 1.0; torch 2.10 or newer, files before torch 1.6') == []
    assert claims.other_versions('measured with torch 2.4.1') == ['torch 2.4.1 is not the 2.11.0 of constraints.txt']


def test_figures_older_than_the_code_are_listed(tmp_path, monkeypatch):
    def commit(date: str) -> None:
        dated = {**os.environ, 'GIT_AUTHOR_DATE': date, 'GIT_COMMITTER_DATE': date}
        me = ['-c', 'user.name=a', '-c', 'user.email=a@b']
        for words in (['add', '-A'], [*me, 'commit', '-qm', 'x']):
            subprocess.run(['git', *words], cwd=tmp_path, env=dated, check=True)

    subprocess.run(['git', 'init', '-q', tmp_path], check=True)
    page, code = tmp_path / 'page.md', tmp_path / 'mmseg_volo/ops/new.py'
    page.write_text('| fast | 1.4x | `mmseg-volo benchmark --quick` |\n| a config | `mmseg-volo benchmark` |\n')
    commit('2026-01-01T00:00:00Z')
    monkeypatch.setattr(claims, 'ROOT', tmp_path)
    monkeypatch.setattr(claims, '_DATES', {})
    assert claims.older_figures(page) == []
    code.parent.mkdir(parents=True)
    code.write_text('new = True')
    commit('2026-01-03T00:00:00Z')
    claims._DATES.clear()
    assert claims.older_figures(page) == [
        'line 1 is 2.0 days older than what it measures: mmseg-volo benchmark --quick'
    ]


@pytest.mark.parametrize('page', claims.PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if re.match(r'[a-z]+:', target):
            continue
        path, _, anchor = target.partition('#')
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f'{target}: no such file'
        if anchor:
            assert anchor in anchors(file), f'{target}: no such heading'


def test_the_readme_fits_on_one_screen_of_text():
    assert len((ROOT / 'README.md').read_text().split()) < 700
