"""A hook that starts a training from another segmentor's weights."""

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from ..config import type_name
from ..models.finetuning import SegmentorWeights


class FinetuneHook(Hook):
    """Load a segmentor's checkpoint, whose classes may be others, once the model has been initialised.

    Args:
        source: the checkpoint; see ``SegmentorWeights``.
        same_classes: its classes are those of the config, in the same order.
    """

    priority = 'VERY_HIGH'

    def __init__(self, source: str, same_classes: bool = False):
        self.source, self.same_classes = source, same_classes

    def read(self) -> None:
        """Read the checkpoint before anything is built, so that a mistake ends the run at once."""
        self.weights = SegmentorWeights(self.source, self.same_classes)

    def before_train(self, runner: Runner) -> None:
        """Load, and log in one line which classes are new."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        classes = runner.train_loop.dataloader.dataset.metainfo['classes']
        runner.logger.info(self.weights.load_into(model, classes))
        del self.weights


def leave_out_pretrained(settings: dict | list) -> None:
    """Remove what would load other weights into a model from its config."""
    for key, value in list(settings.items() if isinstance(settings, dict) else enumerate(settings)):
        if key == 'pretrained' or (key == 'init_cfg' and _is_pretrained(value)):
            settings[key] = None
        elif key == 'init_cfg' and isinstance(value, list):
            settings[key] = [cfg for cfg in value if not _is_pretrained(cfg)]
        elif isinstance(value, dict | list):
            leave_out_pretrained(value)


def _is_pretrained(init_cfg: object) -> bool:
    return isinstance(init_cfg, dict) and 'type' in init_cfg and type_name(init_cfg) in ('Pretrained', 'PretrainedInit')
