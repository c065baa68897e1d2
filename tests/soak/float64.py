"""Tools in float64, one after the other: float64.py tools/train.py ARGUMENTS + tools/test.py ARGUMENTS"""

import runpy
import sys
from itertools import groupby

import torch

if __name__ == '__main__':
    torch.set_default_dtype(torch.float64)
    for is_plus, command in [(key, list(words)) for key, words in groupby(sys.argv[1:], '+'.__eq__)]:
        if not is_plus:
            sys.argv = command
            runpy.run_path(command[0], run_name='__main__')
