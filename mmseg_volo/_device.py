"""The device of a command."""

import torch

from .errors import UserError


def resolve_device(name: str) -> str:
    """``'cuda'`` or ``'cpu'`` for ``'auto'``, otherwise ``name``; raises ``UserError`` if it cannot be used."""
    if name == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        torch.empty(1, device=name).cpu()  # 'meta' creates tensors, but cannot copy them back
    except (RuntimeError, AssertionError) as error:
        no_gpu = name.startswith('cuda') and not torch.cuda.is_available()
        reason = 'torch finds no GPU' if no_gpu else str(error).splitlines()[0]
        raise UserError(f'--device {name} cannot be used ({reason}); --device auto takes what is available') from None
    return name
