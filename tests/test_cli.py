"""The command line: fast help, one sentence for each mistake, the same flags in every command."""

import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import mmseg_volo_cli
from mmseg_volo.config import find_config, parse_options, shipped_configs
from mmseg_volo.errors import UserError
from mmseg_volo_cli import COMMANDS, main, parser

WITHOUT_TOOL = {'completion'}  # only of use for the installed command
OF_THE_CLONE = {'claims', 'gpu-day', 'time-outlook', 'efficientnet-lite0-weights'}  # they need a clone


def python(*words: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), **environment}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize('command', [[], ['train']], ids=['all', 'one'])
def test_help_answers_at_once_because_it_imports_neither_torch_nor_mmseg(command):
    start = time.perf_counter()
    done = python('-X', 'importtime', '-m', 'mmseg_volo_cli', *command, '--help')
    seconds = time.perf_counter() - start
    imported = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and done.stdout.startswith('usage: mmseg-volo')
    assert 'argparse' in imported and imported.isdisjoint({'torch', 'numpy', 'mmengine', 'mmseg_volo'})
    assert seconds < 1.5


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_describes_itself_and_every_argument(command, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments=[command, '--help'])
    assert end.value.code == 0
    printed = ' '.join(capsys.readouterr().out.split())
    assert COMMANDS[command][0] in printed
    commands = next(action for action in parser()._actions if action.dest == 'command').choices
    undescribed = [action.dest for action in commands[command]._actions if not (action.help or action.choices)]
    assert undescribed == []


def test_a_flag_means_the_same_in_every_command():
    commands = next(action for action in parser()._actions if action.dest == 'command').choices
    metavars: dict[str, set] = {}
    for command in commands.values():
        for action in command._actions:
            for flag in action.option_strings:
                metavars.setdefault(flag, set()).add((type(action).__name__, action.metavar in ('PNG', 'JSON', 'FILE')))
    differing = {flag for flag, kinds in metavars.items() if len(kinds) > 1}
    assert differing == {'--resume'}  # after which only commands that train take a checkpoint
    assert metavars['--out'] == {('_StoreAction', True)} and metavars['--out-dir'] == {('_StoreAction', False)}


def test_without_a_command_the_commands_are_listed(capsys):
    assert main(arguments=[]) == 2
    printed = capsys.readouterr().out
    assert all(f'    {command}' in printed for command in COMMANDS)


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (['demmo'], "no command named 'demmo': did you mean demo?"),
        (['zzz'], "no command named 'zzz': choose from demo, train"),
        (['train'], 'the following arguments are required: config'),
        (['train', 'c', '--seed', 'x'], "argument --seed: invalid int value: 'x'"),
        (['train', 'c', '--cfg-options', 'a=1', 'word'], "--cfg-options takes KEY=VALUE, got 'word'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments=arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith(f'error: {sentence}')


@pytest.mark.parametrize('words', [['a.png', 'b', '--amp'], ['--amp', 'a.png', 'b'], ['a.png', '--amp', 'b']], ids=str)
def test_files_that_may_be_left_out_may_also_follow_options(words):
    assert parser().parse_args(['classify', 'volo_d1_224', 'd1.pth', *words]).images == ['a.png', 'b']
    assert parser().parse_args(['classify', 'volo_d1_224', 'd1.pth', '--imagenet', 'val']).images == []


def test_each_tool_is_a_command_and_runs_it(capsys, monkeypatch):
    tools = {path.stem.replace('_', '-'): path for path in (ROOT / 'tools').glob('*.py')}
    tools = {command: path for command, path in tools.items() if command not in OF_THE_CLONE}
    assert set(tools) == set(COMMANDS) - WITHOUT_TOOL
    for command, path in tools.items():
        asked = []
        monkeypatch.setattr(mmseg_volo_cli, 'main', lambda name, asked=asked: asked.append(name) or 0)
        with pytest.raises(SystemExit) as end:
            exec(compile(path.read_text(), str(path), 'exec'), {'__name__': '__main__'})
        assert asked == [command] and end.value.code == 0


def test_missing_packages_are_one_sentence(tmp_path):
    code = (
        'import importlib.util, sys, mmseg_volo_cli\n'
        'find = importlib.util.find_spec\n'
        "importlib.util.find_spec = lambda name, package=None: None if name == 'mmcv' else find(name, package)\n"
        "sys.exit(mmseg_volo_cli.main('configs', []))"
    )
    done = python('-c', code)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert done.stderr.startswith('error: mmseg_volo needs mmcv')


def test_completion_is_a_script_for_the_shell_or_names_the_extra(capsys, monkeypatch):
    pytest.importorskip('shtab')
    assert main(arguments=['completion', 'bash']) == 0
    assert 'mmseg-volo' in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, 'shtab', None)
    assert main(arguments=['completion', 'bash']) == 2
    assert "pip install 'mmseg-volo[completion]'" in capsys.readouterr().err


# Configs by name


def test_a_config_is_found_by_name_or_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config('volo_d4_cityscapes') == shipped_configs()['volo_d4_cityscapes']
    assert find_config('volo_d4_cityscapes').samefile(ROOT / 'configs/volo_d4_cityscapes.py')
    assert find_config('resnet50_camvid').parent.name == 'baselines'
    (tmp_path / 'volo_d4_cityscapes').write_text('a file of that name comes first')
    assert not find_config('volo_d4_cityscapes').is_absolute()


@pytest.mark.parametrize('config', ['volo_d4_cityscape', 'configs/volo_d4_cityscape.py'])
def test_a_mistyped_config_gets_the_nearest_names(config):
    with pytest.raises(UserError, match=f'config not found: {config}; did you mean volo_d4_cityscapes, '):
        find_config(config)


def test_names_of_shipped_configs_are_unique():
    leaves = [path for path in (ROOT / 'configs').rglob('*.py') if '_base_' not in path.parts]
    assert len(shipped_configs()) == len(leaves) > 20


def test_options_are_read_as_mmengine_reads_them():
    words = ['a=1', 'b.c=0.5', 'd=[1,2]', 'e=(x,y)', 'f=None', 'g=text', "h='[1]'"]
    expected = {'a': 1, 'b.c': 0.5, 'd': [1, 2], 'e': ('x', 'y'), 'f': None, 'g': 'text', 'h': [1]}
    assert parse_options(words) == expected and parse_options([]) == {}
    with pytest.raises(UserError, match='--cfg-options cannot be read'):
        parse_options(['a=[1,2'])


def test_the_configs_are_listed_with_head_data_set_and_parameters(capsys):
    assert main(arguments=['configs', 'volo_tiny_[ct]*']) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in printed.splitlines() if 'volo_' in line]
    assert rows == [
        ['volo_tiny_camvid', 'VOLO tiny', 'UPerHead', 'CamVid', '1.4'],
        ['volo_tiny_toy_streets', 'VOLO tiny', 'UPerHead', 'Cityscapes', '1.4'],
    ]
    with pytest.raises(SystemExit):
        main(arguments=['configs', 'unheard of'])
    assert "no shipped config matches 'unheard of'" in capsys.readouterr().err
