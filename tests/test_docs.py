"""README and docs/: commands parse, configs exist, and links and anchors have targets."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

import mmseg_volo_cli

ROOT = Path(__file__).parents[1]
PAGES = sorted({*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md'), *ROOT.glob('mmseg_volo/ops/*/README.md')})
NAMES = {path.stem for path in (ROOT / 'configs').rglob('*.py') if '_base_' not in path.parts}
COMMAND = re.compile(r'(?:^|\s)(?:(?:\S*python[\d.]*\s+)?tools/(\w+)\.py|\S*mmseg-volo[ \t]+(?=[a-z]))(.*)')


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(text: str) -> list[tuple[str, str]]:
    """Each command in code blocks and code spans: (line, arguments after the program's name)."""
    blocks = re.findall(r'^```(?:bash|console|sh)\n(.*?)^```', text, re.MULTILINE | re.DOTALL)
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    outside = re.sub(r'^(```|~~~).*?^\1', '', text, flags=re.MULTILINE | re.DOTALL)
    found = []
    for line in lines + [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', outside)]:
        match = COMMAND.search(re.split(r'\s#\s|\s+\|\s|\s*&&', line.strip())[0])
        if match:
            tool, rest = match.groups()
            found.append((line, f'{tool.replace("_", "-")} {rest}' if tool else rest.strip()))
    return found


def option_names(command: str) -> set[str]:
    alone = argparse.ArgumentParser()
    mmseg_volo_cli.COMMANDS[command][1](alone)
    return set(re.findall(r'--[\w-]+', alone.format_help()))


def anchors(path: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub and MyST make them."""
    text = re.sub(r'^```.*?^```', '', path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r'^#+ (.+)$', text, re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).strip().replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=page_id)
def test_commands_parse(page, capsys):
    parser = mmseg_volo_cli.parser()
    for line, arguments in commands(page.read_text()):
        words = shlex.split(arguments.replace('$BACK', 'a=b'))
        assert words[0] in mmseg_volo_cli.COMMANDS, f'no command {words[0]!r}: {line}'
        if len(words) == 1 or words[1].startswith('--') or {'...', '…'} & set(words):  # not a whole command
            known = option_names(words[0])
            assert all(word in known for word in words if word.startswith('--')), line
            continue
        try:
            parser.parse_args(words)
        except SystemExit as stop:
            assert stop.code == 0, f'{line}\n{capsys.readouterr().err}'


@pytest.mark.parametrize('page', PAGES, ids=page_id)
def test_configs_exist(page):
    text = page.read_text()
    for name in re.findall(r'\bconfigs/([\w/]+\.py)', text):
        assert (ROOT / 'configs' / name).is_file(), name
    for name in re.findall(
        r'`(?:mmseg-volo \w+ )?((?:volo|resnet50|swin_t)_\w+_?(?:camvid|cityscapes|ade20k|toy_streets)\w*)`', text
    ):
        assert name in NAMES, name
    for line, arguments in commands(text):
        words = arguments.split()
        if words[0] in ('train', 'test', 'infer', 'check-data', 'profile-step', 'benchmark-sliding') and len(words) > 1:
            config = words[1]
            shipped = config in NAMES or config in ('CONFIG', '...') or config.endswith('.py')
            assert shipped or config.startswith('-'), line


@pytest.mark.parametrize('page', PAGES, ids=page_id)
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
