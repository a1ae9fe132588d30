"""Derivatives of the operators for torch.autograd, in both modes, and for torch.func.

A custom operator of torch has rules for torch.compile and for backward alone: torch.func.grad refuses it, and its
tangents in forward mode are zero without a word.
"""
import torch
from torch._functorch import eager_transforms
from torch.autograd import forward_ad


def differentiable(operator, setup_context, backward, jvp):
    """A function that calls a custom operator and has its derivatives in both modes; torch.vmap goes sample by sample.

    setup_context, backward, jvp: as of torch.autograd.Function. torch.compile sees the operator alone, and so has no
    forward mode.
    """
    operator.register_autograd(backward, setup_context=setup_context)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            output = operator(*args)
            return tuple(output) if isinstance(output, list) else output

        @staticmethod
        def vmap(info, in_dims, *args):
            calls = []
            for n in range(info.batch_size):
                sample = (x.select(dim, n) if isinstance(dim, int) else x for x, dim in zip(args, in_dims))
                calls.append(Function.apply(*sample))
            outputs = tuple(torch.stack(samples) for samples in zip(*calls))
            return outputs, (0,) * len(outputs)

    Function.setup_context, Function.backward = staticmethod(setup_context), staticmethod(backward)
    Function.jvp = staticmethod(jvp)

    def call(*args):
        forward_mode = forward_ad._current_level >= 0
        if torch.compiler.is_compiling():
            if forward_mode:
                raise RuntimeError("elsa_attention and hadamard have no forward-mode derivative (torch.func.jvp, "
                                   "jacfwd, linearize, forward_ad) inside torch.compile; leave it outside")
            return operator(*args)
        if forward_mode or torch._C._are_functorch_transforms_active():
            return Function.apply(*args)
        return operator(*args)  # the same, in less time

    return call


def differentiable_no_further(operator):
    """Likewise of an operator that is a derivative itself."""
    return differentiable(operator, lambda ctx, inputs, output: None, no_second_derivative, no_second_derivative)


def no_second_derivative(ctx, *grads):
    raise RuntimeError("elsa_attention and hadamard have a first derivative only; one was differentiated twice "
                       "(create_graph=True, or torch.func.grad, jvp and the like inside each other). Use "
                       "kernels.elsa_attention_reference and torch's convolution where a second derivative is needed")


def refuse_nested_forward_mode():
    """To be called in a jvp: torch calls it with forward mode off, so an outer jvp would see zeros."""
    if eager_transforms.JVP_NESTING > 1:
        no_second_derivative(None)
