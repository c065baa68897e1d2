#!/usr/bin/env python
"""Put a trained segmentor into the package, so that ``mmseg-volo infer CONFIG PICTURE`` works without a checkpoint.

    .ci/ship_weights.py volo_tiny_camvid work_dirs/volo_tiny_camvid/iter_8000.pth

Writes mmseg_volo/weights/CONFIG.safetensors, its floating-point numbers in float16, and its digest to index.json.
The figures belong into mmseg_volo/weights/README.md.
"""

import argparse
import json

import torch
from safetensors.torch import save_file

from mmseg_volo._files import file_sha256
from mmseg_volo.apis.predictor import Predictor
from mmseg_volo.checkpoints.shipped import FOLDER
from mmseg_volo.config import load_config


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='name of a shipped config')
    parser.add_argument('checkpoint')
    args = parser.parse_args()
    model = Predictor(load_config(args.config, {}), args.checkpoint, 'cpu', tta=False, amp=False).model
    state = {name: _halved(tensor).contiguous() for name, tensor in model.state_dict().items()}
    path = FOLDER / f'{args.config}.safetensors'
    save_file(state, str(path), metadata=dict(format='pt'))
    path.chmod(0o644)  # safetensors makes it unreadable for others
    index = json.loads((FOLDER / 'index.json').read_text())
    index[args.config] = dict(sha256=file_sha256(path))
    (FOLDER / 'index.json').write_text(json.dumps(index, indent=2, sort_keys=True) + '\n')
    print(f'{path}: {path.stat().st_size / 1e6:.2f} MB')


def _halved(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    assert half.isfinite().all(), 'too large for float16'
    return half


if __name__ == '__main__':
    main()
