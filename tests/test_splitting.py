"""Dividing pictures into splits: deterministic, whole groups, close to the shares."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg_volo.datasets.splitting import divide
from mmseg_volo.errors import UserError


def groups_of(names: list[str], key) -> set[str]:
    return {key(name) for name in names}


def frames(sequences: int, length: int) -> list[str]:
    return [f'drive{s:02d}x/frame_{i:04d}.jpg' for s in range(sequences) for i in range(length)]


def test_sequences_are_not_torn_and_the_share_is_met():
    names = frames(20, 7)
    splits = divide(names, dict(test=0.1, val=0.2), seed=0).splits
    assert {split: len(found) for split, found in splits.items()} == dict(test=14, val=28, train=98)
    parts = [groups_of(found, lambda name: name.partition('/')[0]) for found in splits.values()]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 20
    assert sorted(name for found in splits.values() for name in found) == sorted(names)


@pytest.mark.parametrize(
    ('names', 'key', 'rule'),
    [
        (['a_001.png', 'a_002.png', 'b-7.png', 'b-8.png'], lambda n: n[0], 'numbers at their end'),
        (['s_0_0.png', 's_0_512.png', 't_0_0.png', 't_512_0.png'], lambda n: n[0], 'numbers at their end'),
        (['IMG_0101_09.jpg', 'IMG_0101_10.jpg', 'IMG_0102_09.jpg'], lambda n: n[:8], 'the last number'),
        (['cat.png', 'dog.png', 'cow.png'], lambda n: n, 'numbers at their end'),
        (['x/1.png', 'x/2.png', 'y/1.png'], lambda n: n[0], 'numbers at their end'),
    ],
    ids=['sequences', 'tiles', 'days', 'names', 'folders'],
)
def test_a_group_is_a_name_without_its_numbers(names, key, rule):
    division = divide(names, dict(val=0.3), seed=1)
    train, val = (groups_of(division.splits[split], key) for split in ('train', 'val'))
    assert not train & val and rule in division.rule
    assert division.rule.startswith(f'{len(groups_of(names, key))} groups, each in one split: ')


def test_one_long_sequence_is_divided_into_blocks():
    names = [f'{i}.png' for i in range(100)]
    division = divide(names, dict(val=0.2), seed=3)
    numbers = sorted(int(name.removesuffix('.png')) for name in division.splits['val'])
    assert numbers == list(range(numbers[0], numbers[0] + 20)) and '5 blocks of consecutive pictures' in division.rule


def test_a_pattern_names_the_groups():
    names = [f'{camera}_{day}_{i}.png' for camera in 'ab' for day in 'xyz' for i in range(4)]
    splits = divide(names, dict(val=0.34), 0, r'_(.)_').splits
    assert len(groups_of(splits['val'], lambda name: name[2])) == 1 and len(splits['val']) == 8
    splits = divide(names, dict(val=0.25), 0, '.*').splits
    assert len(splits['val']) == 6


def test_equal_pictures_stay_together():
    names = [f'{letter}.png' for letter in 'abcdefghij']
    contents = {name: name for name in names} | {
        'a.png': 'same',
        'e.png': 'same',
        'j.png': 'same',
        'b.png': 'B',
        'c.png': 'B',
    }
    for seed in range(8):
        for found in divide(names, dict(val=0.5), seed, contents=contents).splits.values():
            assert len({'a.png', 'e.png', 'j.png'} & set(found)) in (0, 3)
            assert len({'b.png', 'c.png'} & set(found)) in (0, 2)


def test_the_order_of_the_names_does_not_matter_but_the_seed_does():
    names = frames(10, 3)
    first = divide(names, dict(val=0.3), 0).splits
    assert divide(names[::-1], dict(val=0.3), 0).splits == first
    assert any(divide(names, dict(val=0.3), seed).splits != first for seed in range(1, 5))


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(1, 9), min_size=3, max_size=12),
    st.floats(0.05, 0.45),
    st.floats(0.05, 0.45),
    st.integers(0, 99),
)
def test_every_picture_is_in_one_split_and_none_is_empty(lengths, val, test, seed):
    names = [f'{chr(97 + i)}{j}.png' for i, length in enumerate(lengths) for j in range(length)]
    splits = divide(names, dict(test=test, val=val), seed).splits
    assert sorted(name for found in splits.values() for name in found) == sorted(names) and all(splits.values())
    parts = [groups_of(found, lambda name: name[0]) for found in splits.values()]
    assert sum(map(len, parts)) == len(lengths)


def test_two_groups_cannot_be_divided_into_three():
    with pytest.raises(UserError, match='^6 pictures in 2 groups cannot be divided into 3 splits; --group chooses'):
        divide([f'{letter}{i}.png' for letter in 'ab' for i in range(3)], dict(test=0.2, val=0.2), 0)
