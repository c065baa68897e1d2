"""Pre-training of VOLO on ImageNet or another folder of images, with token labels.

Paper: https://arxiv.org/abs/2104.10858. ``data`` and ``model`` need mmpretrain, which the extra ``pretrain`` installs.
"""
