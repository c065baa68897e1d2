#!/usr/bin/env python
from mmseg_volo_cli import main

if __name__ == '__main__':
    raise SystemExit(main('look'))
