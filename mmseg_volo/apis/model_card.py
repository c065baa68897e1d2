"""The page that describes a model on the Hugging Face hub."""

from collections.abc import Mapping
from html import escape
from typing import Any

from ..config import type_name

SITE = 'https://github.com/mmseg-volo/mmseg-volo'
AUTHORS = (
    'The authors of VOLO write about theirs: "This repo is under the Apache-2.0 license. For commercial use, please '
    'contact with the authors." ImageNet\'s terms of access allow its images for non-commercial research and education.'
)


def model_card(
    content: Mapping, source: str, license: str, data: str | None, start: str | None, measured: dict | None
) -> str:
    """Text of ``README.md``, with the metadata that the hub reads.

    Args:
        content: of the model's ``config.json``.
        source: what follows ``mmseg-volo infer``.
        license: the hub's name of the weights' licence.
        data: name of the data set, or None if it has none.
        start: checkpoint from which the backbone started, or None for random weights.
        measured: content of the ``metrics.json`` of these weights, or None.
    """
    from huggingface_hub import EvalResult, ModelCardData

    name, model, meta = content['name'], content['model'], content['dataset_meta']
    backbone, heads = model['backbone'], model['decode_head']
    head = type_name(heads if isinstance(heads, dict) else heads[-1])
    arch = backbone.get('arch')
    kind = f'{type_name(backbone)} {arch if isinstance(arch, str) else ""}'.strip()
    results = []
    if measured:
        result = EvalResult(
            task_type='image-segmentation',
            task_name='Semantic segmentation',
            dataset_type=data or 'unknown',
            dataset_name=data or 'unknown',
            metric_type='mean_iou',
            metric_name='mIoU (%)',
            metric_value=round(measured['metrics']['mIoU'], 2),
        )
        results = [result]
    metadata = ModelCardData(
        license=license,
        library_name='mmseg_volo',
        pipeline_tag='image-segmentation',
        tags=['semantic-segmentation', 'mmsegmentation', type_name(backbone).lower()],
        datasets=[data] if data else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    python = (
        f'backbone = {type_name(backbone)}.from_pretrained({source!r})  # in eval mode; its weights, without the head'
    )
    return f"""---
{metadata.to_yaml()}
---

# {name}

{kind} with {head} for semantic segmentation into {len(meta['classes'])} classes, made with [mmseg_volo]({SITE}).

## Use it

```bash
pip install 'mmseg-volo[onedl]'
mmseg-volo infer {source} street.jpg
```

```python
from mmseg_volo import {type_name(backbone)}

{python}
```

`config.json` is plain data and `model.safetensors` holds tensors: neither contains code.

## Results

{_results(measured)}

## Classes

{_classes(meta)}

## Licences

- These weights: {'their author has not chosen a licence.' if license == 'unknown' else f'{license}.'}
- mmseg_volo: Apache-2.0.
- The images from which they were learned{f' ({data})' if data else ''}: see the terms of the data set.
- {_origin(start)}
"""


def _origin(start: str | None) -> str:
    if start is None:
        return 'The config names no weights from which the backbone started.'
    named = f' `{start}`' if start.startswith(('timm://', 'hf://', 'https://', 'http://')) else ''
    return f'The backbone started from pre-trained weights{named}. {AUTHORS}'


def _results(measured: dict | None) -> str:
    if measured is None:
        return 'Not measured.'
    scores = {key: value for key, value in measured['metrics'].items() if value is not None}
    bounds = measured.get('intervals', {})
    table = ['| score | % | 95 % interval |', '|---|---|---|']
    for key, value in scores.items():
        interval = '{:.2f} to {:.2f}'.format(*bounds[key]) if key in bounds else ''
        table.append(f'| {_cell(key)} | {value:.2f} | {interval} |')
    rows = ['', '| class | IoU, % |', '|---|---|']
    rows += [f'| {_cell(row["name"])} | {row["IoU"]:.2f} |' for row in measured['classes'] if row['IoU'] is not None]
    versions = ', '.join(f'{name} {version}' for name, version in measured['versions'].items())
    circumstances = (
        f'\n`mmseg-volo test` on {measured["images"]} images{" with --tta" if measured["tta"] else ""}, '
        f'{measured["device"]}, {versions}.'
    )
    return '\n'.join([*table, *rows, circumstances])


def _classes(meta: Mapping[str, Any]) -> str:
    rows = ['| id | class | colour |', '|---|---|---|']
    for i, (name, colour) in enumerate(zip(meta['classes'], meta['palette'], strict=True)):
        rows.append(f'| {i} | {_cell(name)} | #{bytes(colour).hex()} |')
    return '\n'.join(rows)


def _cell(text: str) -> str:
    return escape(text).replace('|', '&#124;')
