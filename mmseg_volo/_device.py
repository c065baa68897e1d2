"""The device of a command, and mixed precision on it."""

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


def mixed_precision(device: str, enabled: bool) -> torch.autocast:
    """Autocast to bfloat16, or to float16 on a GPU without bfloat16."""
    kind = torch.device(device).type
    lacks_bfloat16 = kind == 'cuda' and not torch.cuda.is_bf16_supported()
    return torch.autocast(kind, torch.float16 if lacks_bfloat16 else torch.bfloat16, enabled=enabled)
