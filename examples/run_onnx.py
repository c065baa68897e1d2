"""Segment a picture with an exported file, without mmseg_volo or torch: run_onnx.py model.onnx photo.jpg labels.png"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

model, picture, out = sys.argv[1:]
session = onnxruntime.InferenceSession(model)
about = json.loads(session.get_modelmeta().custom_metadata_map['mmseg_volo'])
image = Image.open(picture).convert('RGB')
size = image.size
for step in about['resize']:  # as large as fits into the scale, in either orientation
    factor = min(max(step['scale']) / max(size), min(step['scale']) / min(size))
    image = image.resize([int(s * factor + 0.5) for s in size] if step['keep_ratio'] else step['scale'], Image.BILINEAR)
pixels = np.asarray(image, np.float32)[..., :: 1 if about['channels'] == 'RGB' else -1]
pixels = (pixels - np.float32(about['mean'])) / np.float32(about['std'])
logits = session.run(None, {'images': pixels.transpose(2, 0, 1)[None]})[0][0]
t = about['threshold']  # of a probability, if there is one logit for two classes
labels = logits.argmax(0) if t is None else logits[0] > np.log(t / (1 - t))
result = Image.fromarray(labels.astype(np.uint8)).resize(size, Image.NEAREST)
result.putpalette(sum(about['palette'], []))
result.save(out)
