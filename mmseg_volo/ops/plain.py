"""Whether calling a module can be replaced by its formula."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` runs only the ``forward`` of ``kind``: that very class, without hooks.

    Parametrizations change a module's class.
    """
    return (
        type(module) is kind
        and 'forward' not in vars(module)
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or _has_any_global_hook()
        )
    )
