"""Write a small data set of procedural street scenes in Cityscapes' layout."""

import argparse

from mmseg_volo.datasets.toy_streets import make_toy_streets, parse_size
from mmseg_volo.error_messages import one_sentence_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('out', help='folder to write; refused if it holds anything else')
    parser.add_argument('--train', type=int, default=400, help='number of training scenes')
    parser.add_argument('--val', type=int, default=40, help='number of validation scenes')
    parser.add_argument('--size', default='256x128', help='width x height in pixels')
    parser.add_argument('--seed', type=int, default=0, help='another seed gives other scenes')
    args = parser.parse_args()
    with one_sentence_errors():
        make_toy_streets(args.out, args.train, args.val, parse_size(args.size), args.seed)


if __name__ == '__main__':
    main()
