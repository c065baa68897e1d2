"""Dividing pictures into training, validation and test sets, without tearing sequences apart."""

import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import UserError

# What is left out of names, until more than one group remains.
NUMBERS = {
    'that differ in the numbers at their end': re.compile(r'([\W_]*\d+)+$'),
    'that differ in the last number': re.compile(r'[\W_]*\d+$'),
}


@dataclass
class Division:
    """Names by split, and the rule in words."""

    splits: dict[str, list[str]]
    rule: str


def divide(
    names: Sequence[str],
    shares: Mapping[str, float],
    seed: int,
    pattern: str | None = None,
    contents: Mapping[str, str] | None = None,
) -> Division:
    """Divide pictures into ``'train'`` and other splits, where groups stay together.

    A group is a folder and a name without the numbers at its end, as frames of a sequence and tiles of a picture have
    them. If that is one group for all, only the last number is left out, and if there is still one, the pictures in the
    order of their numbers are divided into blocks.

    Args:
        names: paths of pictures.
        shares: share of the pictures by split, such as ``{'val': 0.2}``; train gets the rest.
        seed: which groups are drawn.
        pattern: regular expression whose first group, or whole match, in a path names its group instead.
        contents: digest by name; pictures with equal ones stay together, too.

    Raises:
        UserError: too few groups, shares that leave nothing for training, or a pattern that does not match.
    """
    if not all(0 < share for share in shares.values()) or sum(shares.values()) >= 1:
        raise UserError(f'shares of val and test must be above 0 and below 1 together, got {dict(shares)}')
    groups, rule = _groups(names, min(shares.values()), pattern)
    groups = _joined(groups, contents or {})
    if len(groups) <= len(shares):
        raise UserError(
            f'{len(names)} pictures in {len(groups)} group{"s" * (len(groups) != 1)} cannot be divided into '
            f'{len(shares) + 1} splits; --group chooses other groups'
        )
    left = sorted(sorted(group) for group in groups)
    random.Random(seed).shuffle(left)
    splits = {}
    for position, (split, share) in enumerate(shares.items()):
        target = share * len(names)
        chosen: list[list[str]] = []
        most = len(left) - (len(shares) - position)  # at least a group for each split that follows
        for group in left:
            if len(chosen) < most and sum(len(other) for other in chosen) + len(group) <= max(1, target + 0.5):
                chosen.append(group)
        chosen = chosen or [min(left, key=len)]
        left = [group for group in left if group not in chosen]
        splits[split] = sorted(name for group in chosen for name in group)
    splits['train'] = sorted(name for group in left for name in group)
    return Division(splits, f'{len(groups)} {rule}')


def _groups(names: Sequence[str], share: float, pattern: str | None) -> tuple[list[list[str]], str]:
    if pattern is not None:
        return _by_key(
            names, [_matched(pattern, name) for name in names]
        ), f'groups, each in one split: names with one {pattern!r}'
    for words, ending in NUMBERS.items():
        groups = _by_key(names, [ending.sub('', name.rpartition('.')[0]) for name in names])
        if len(groups) > 1:
            return groups, f'groups, each in one split: names {words}'
    ordered = sorted(names, key=lambda name: [int(number) for number in re.findall(r'\d+', name)])
    length = max(1, round(share * len(ordered)))
    blocks = [ordered[i : i + length] for i in range(0, len(ordered), length)]
    return blocks, 'blocks of consecutive pictures, because all names differ in their numbers alone'


def _matched(pattern: str, name: str) -> str:
    try:
        match = re.search(pattern, name)
    except re.error as error:
        raise UserError(f'--group must be a regular expression, got {pattern!r} ({error})') from None
    if match is None:
        raise UserError(f'--group {pattern!r} matches no part of {name}')
    return match[1] if match.re.groups and match[1] is not None else match[0]


def _by_key(names: Sequence[str], keys: Sequence[str]) -> list[list[str]]:
    groups = defaultdict(list)
    for name, key in zip(names, keys, strict=True):
        groups[key].append(name)
    return list(groups.values())


def _joined(groups: list[list[str]], contents: Mapping[str, str]) -> list[list[str]]:
    """Groups, joined where they share a picture."""
    group_of: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for group in groups:
        for name in group:
            group_of[name] = group
    for name in sorted(contents):
        twin = owner.setdefault(contents[name], name)
        mine, other = group_of[name], group_of[twin]
        if mine is not other:
            other += mine
            for moved in mine:
                group_of[moved] = other
    return list({id(group): group for group in group_of.values()}.values())
