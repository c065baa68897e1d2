"""Run commands one after another in float64: float64.py train ARGUMENTS + test ARGUMENTS"""

import sys
from itertools import groupby

import torch

from mmseg_volo_cli import main

if __name__ == '__main__':
    torch.set_default_dtype(torch.float64)
    for is_plus, command in [(key, list(words)) for key, words in groupby(sys.argv[1:], '+'.__eq__)]:
        if not is_plus:
            status = main(command[0], command[1:])
            if status:
                sys.exit(status)
