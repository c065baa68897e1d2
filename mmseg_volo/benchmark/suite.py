"""Speed and memory of the operators, the backbone and whole segmentors. Parity is checked first."""

import json
from collections.abc import Sequence

from mmengine.registry import init_default_scope

from .._device import resolve_device
from .._files import whole
from ..config import output_path
from ..errors import UserError
from ..ops import explain
from .attention import AttentionBench
from .backbone import BackboneBench
from .heads import HeadBench
from .runtimes import RuntimeBench
from .segmentor import segmentor_speed
from .tables import print_table
from .timing import environment

TITLES = {
    'operator': 'outlook attention: ours against the unfold form of timm and the authors',
    'forward': 'backbone, forward',
    'train-step': 'backbone, forward + backward',
    'memory': 'memory of the backbone',
    'segmentor': "whole segmentor: our neck and head against mmseg's, with the same backbone",
    'segmentor-memory': 'activations of a whole segmentor that a train step keeps',
    'biased-attention': "attention with relative bias: ours against timm's, which stores the whole bias",
}
MORE = {'runtimes': 'exported segmentors on a CPU: ours is PyTorch in float32'}  # need another extra


def run_benchmark(
    device: str = 'auto',
    quick: bool = False,
    compiled: bool = False,
    out: str | None = None,
    tables: Sequence[str] = tuple(TITLES),
    segmentors: Sequence[str] = ('volo_d4_cityscapes', 'volo_d5_cityscapes'),
) -> dict:
    """Measure speed and memory on this machine against timm and mmseg, print the tables and return them.

    Times are ratios with their spread: the median over paired rounds, lowest to highest. A GPU runs bfloat16
    under autocast, a CPU float32. Nothing is timed unless values and gradients match.

    Args:
        device: ``'auto'``, ``'cpu'`` or ``'cuda'``.
        quick: fewer rounds, and no timm in channels_last.
        compiled: also measure timm under ``torch.compile``, which takes minutes on a CPU.
        out: JSON file that also gets every measurement.
        tables: keys of ``TITLES`` or ``MORE``; the others are left out.
        segmentors: configs whose whole train step is measured on a GPU, together with ``'segmentor-memory'``.

    Raises:
        UserError: the device is missing, the file is not writable, or parity failed.
    """
    device = resolve_device(device)
    path = None if out is None else output_path(out, '.json')  # before the minutes that measuring takes
    init_default_scope('mmseg')
    env = environment(device)
    print('\n'.join(f'{key}: {value}' for key, value in env.items()) + f'\n{explain()}')

    backbone, heads = BackboneBench(device, quick, compiled), HeadBench(device, quick)
    attention, runtimes = AttentionBench(device, quick), RuntimeBench(quick)
    measures = {
        'operator': backbone.operator,
        'forward': backbone.forward,
        'train-step': backbone.train_step,
        'memory': backbone.memory,
        'segmentor': heads.speed,
        'segmentor-memory': heads.memory,
        'biased-attention': attention.measure,
        'runtimes': runtimes.speed,
    }
    of_heads = [name for name in tables if name.startswith('segmentor')]
    of_attention = [name for name in tables if name == 'biased-attention']
    of_runtimes = [name for name in tables if name in MORE]
    rows = [
        *(backbone.parity() if len(of_heads) + len(of_attention) + len(of_runtimes) < len(tables) else []),
        *(heads.parity() if of_heads else []),
        *(attention.parity() if of_attention else []),
        *(runtimes.parity() if of_runtimes else []),
    ]
    dtype = backbone.dtype_name
    print_table(rows, f'parity: largest error against float64, relative to the largest value ({dtype})')
    broken = [row['what'] for row in rows if not row['met']]
    if broken:
        raise UserError(f'parity failed, so no speed is measured: {", ".join(broken)}')
    backbone.find_floors()
    found = {'parity': rows}
    for name in tables:
        found[name] = measures[name]()
        print_table(found[name], f'{(TITLES | MORE)[name]} ({dtype})')
    if device == 'cuda' and 'segmentor-memory' in tables:
        found['recipes'] = [segmentor_speed(config, device) for config in segmentors]
        print_table(found['recipes'], 'whole train step, bfloat16 autocast, AdamW')
    result = dict(environment=environment(device), tables=found)
    if path is not None:
        with whole(path) as partial:
            partial.write_text(json.dumps(result, indent=2))
    return result
