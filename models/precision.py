"""The precision of what autocast leaves in 16 bits."""
import torch
import torch.nn as nn


def widened(x):
    """A tensor of 16-bit floats as float32, any other as it is: losses and boxes are computed no narrower than that."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class LayerNorm(nn.LayerNorm):
    """Computed in the precision of its weights, as autocast has it on GPUs anyway.

    On CPUs autocast would leave it in 16 bits, where the library adds up the gradients of weight and bias in 16 bits,
    too, and loses most of a sum over thousands of pixels: docs/results/2026-11-25-bf16-gradients.md.
    """

    def forward(self, x):
        return super().forward(x.to(torch.promote_types(x.dtype, self.weight.dtype)))
