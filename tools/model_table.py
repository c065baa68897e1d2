#!/usr/bin/env python
"""Print README's table of backbones as Markdown: tools/model_table.py"""

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmseg_volo import ARCHITECTURES, VOLO


def gmacs(arch: str, size: int) -> float:
    """Multiply-adds of one forward pass of a ``size`` x ``size`` image, in billions, counted by torch."""
    with torch.device('meta'), FlopCounterMode(display=False) as counter, torch.no_grad():
        VOLO(arch, img_size=size).eval()(torch.empty(1, 3, size, size))
    return counter.get_total_flops() / 2e9


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print('| arch | blocks | widths | heads | parameters, M | GMACs at 512² | GMACs at 1024² | strides |')
    print('|---|---|---|---|---|---|---|---|')
    for arch, row in ARCHITECTURES.items():
        with torch.device('meta'):
            model = VOLO(arch)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        print(
            f'| {arch} | {", ".join(map(str, row["layers"]))} | {row["embed_dims"][0]}, {row["embed_dims"][1]} '
            f'| {row["num_heads"][0]}, {row["num_heads"][1]} | {parameters:.2f} | {gmacs(arch, 512):.1f} '
            f'| {gmacs(arch, 1024):.0f} | {", ".join(map(str, model.out_strides))} |'
        )


if __name__ == '__main__':
    main()
