"""A network as torch.export records it, for every batch, height and width, without this package's operators."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..ops.pooling import adaptive_avg_pool

EXAMPLE = (70, 90)  # no multiple of a stride, so that padding and cropping are recorded


class Network(nn.Module):
    """A segmentor from normalised images ``[B, C, H, W]`` to logits of the same size.

    Logits at the head's resolution would be smaller, but whoever runs the file would have to resize them as mmseg does.

    Args:
        segmentor: an ``EncoderDecoder``; its auxiliary heads are removed, because they only train.

    ``channels`` is C.
    """

    def __init__(self, segmentor: Any):
        super().__init__()
        if segmentor.with_auxiliary_head:
            del segmentor.auxiliary_head
        self.segmentor = segmentor
        self.channels = getattr(segmentor, 'image_channels', 3)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes, H, W]``."""
        return self.segmentor.encode_decode(images, [dict(img_shape=images.shape[2:])])


def record(network: nn.Module, size: tuple[int, int] | None) -> ExportedProgram:
    """Record ``network``, from images ``[B, C, H, W]`` to logits, for any batch and, if ``size`` is None, any size."""
    example = torch.zeros(2, getattr(network, 'channels', 3), *(size or EXAMPLE))
    axes = {0: Dim.DYNAMIC} if size else {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    network.requires_grad_(False).eval()
    with torch.no_grad(), no_shape_cache():
        program = torch.export.export(network, (example,), dynamic_shapes=(axes,), strict=False)
        pool = torch.ops.aten.adaptive_avg_pool2d.default
        if size is None and any(node.target is pool for node in program.graph.nodes):  # mmseg's own UPerHead
            program = program.run_decompositions({torch.ops.aten._adaptive_avg_pool2d.default: adaptive_avg_pool})
    _forget_origin(program)
    return program


def no_shape_cache() -> AbstractContextManager:
    """Context without torch's cache of shapes, which costs more than it saves when they are symbolic."""
    return torch._dynamo.config.patch(fake_tensor_cache_enabled=False)


def _forget_origin(program: ExportedProgram) -> None:
    """Remove the lines and folders of the source, which would be stored with every node."""
    for node in program.graph.nodes:
        for key in ('stack_trace', 'nn_module_stack', 'source_fn_stack', 'from_node', 'torch_fn'):
            node.meta.pop(key, None)
