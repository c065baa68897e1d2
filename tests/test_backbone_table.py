"""The table of all backbones: its rows, their numbers, and the copy in docs/models.md."""

import pytest
import torch
from conftest import ROOT

from mmseg_volo.apis import backbone_table
from mmseg_volo.evaluation.imagenet import PROMISED
from mmseg_volo.models import ARCHITECTURES, COATNET_ARCHITECTURES, HVT_ARCHITECTURES, VOLO
from mmseg_volo_cli import main


def rows(printed: str) -> dict[str, dict[str, str]]:
    """Cells by column, by name of the backbone; lines before the table are ignored."""
    lines = [line.strip('| ').split(' | ') for line in printed.splitlines() if line.startswith('| ')]
    return {cells[0]: dict(zip(lines[0], cells, strict=True)) for cells in lines[1:]}


def test_every_architecture_has_a_row_with_weights_source_and_licence(capsys, monkeypatch):
    monkeypatch.setattr(backbone_table, '_size', lambda name: {})  # building all of them takes a minute
    assert main(arguments=['configs', '--backbones']) == 0
    table = rows(capsys.readouterr().out)
    expected = {f'volo_{arch}' for arch in ARCHITECTURES}
    expected |= {f'coatnet_{arch}' for arch in COATNET_ARCHITECTURES} | {f'hvt_{arch}' for arch in HVT_ARCHITECTURES}
    assert set(table) == expected
    for row in table.values():
        if row['top-1, %'] != '-':
            assert float(row['top-1, %']) == PROMISED[row['weights'].strip('`')]['val']
            assert row['source of top-1'] != '-'
        assert (row['licence'] == 'Apache-2.0') == (row['weights'] != 'none released')
    without = {name for name, row in table.items() if row['weights'] == 'none released'}
    assert without == {'volo_tiny', 'coatnet_tiny', 'hvt_tiny', *(f'coatnet_{number}' for number in range(6))}
    best = {name: (row['weights'], row['top-1, %']) for name, row in table.items()}
    assert best['volo_d5'] == ('`volo_d5_512.sail_in1k`', '87.07')
    assert best['coatnet_rmlp_1_rw'] == ('`coatnet_rmlp_1_rw_224.sw_in1k`', '83.36')
    assert best['coatnet_3_rw'] == ('`coatnet_3_rw_224.sw_in12k`', '-')  # a classifier of other classes
    assert best['hvt_s1'] == ('`hvt_s1_224`', '78.00')


def test_numbers_of_a_row_are_those_of_the_model(capsys):
    main(arguments=['models', 'hvt_s0'])
    row = rows(capsys.readouterr().out)['hvt_s0']
    # 12 blocks of width 384 on patches of 8 x 8 pixels, without poolings: linear layers, attention, and the stem.
    for side in (512, 1024):
        tokens = (side // 8) ** 2
        macs = 12 * (12 * tokens * 384**2 + 2 * tokens**2 * 384) + tokens * 384 * 3 * 64
        assert float(row[f'GMACs at {side}²']) == pytest.approx(macs / 1e9, abs=0.5 if side == 1024 else 0.05)
    assert row['strides'] == '8, 8, 8, 8'
    main(arguments=['configs', 'volo_tiny', '--backbones'])
    row, model = rows(capsys.readouterr().out)['volo_tiny'], VOLO('tiny')
    assert row['parameters, M'] == f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f}'
    assert row['strides'] == ', '.join(str(64 // y.shape[2]) for y in model(torch.zeros(1, 3, 64, 64)))


def test_chosen_backbones_are_measured(capsys):
    assert main(arguments=['configs', '--backbones', 'tiny', '--measure', 'volo', 'coatnet*']) == 0
    printed = capsys.readouterr().out
    machine = printed.splitlines()[0]
    assert f'{torch.get_num_threads()} threads' in machine and f'torch {torch.__version__}' in machine
    table = rows(printed)
    for name in ('volo_tiny', 'coatnet_tiny'):
        assert float(table[name]['CPU forward, ms']) > 1
        assert 10 < float(table[name]['activations, MiB']) < 1000
    assert set(list(table['hvt_tiny'].values())[-2:]) == {'not measured'}


@pytest.mark.parametrize(
    ('words', 'sentence'),
    [
        (['--backbones', 'zzz'], "no backbone matches 'zzz'; mmseg-volo configs --backbones lists all of them"),
        (['--backbones', '--measure', 'zzz'], "no backbone matches 'zzz'; "),
        (['--measure'], '--measure needs --backbones'),
    ],
    ids=str,
)
def test_wrong_patterns_are_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments=['configs', *words])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'error: {sentence}')


def test_the_page_on_models_shows_the_table(capsys):
    page = (ROOT / 'docs/models.md').read_text()
    main(arguments=['configs', '--backbones', 'volo_d1'])
    header, rule, row = capsys.readouterr().out.splitlines()
    assert header.strip('|') in page and rule in page and row.rstrip('|') in page
    assert all(f'\n| {name} | ' in page for name in backbone_table.backbone_names())
