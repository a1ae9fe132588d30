"""ELSA's local attention, and what generates its maps, for CPU and GPU. Depends on torch and triton alone: the folder can be lifted out whole."""
from kernels.op import elsa_attention, hadamard
from kernels.reference import elsa_attention_reference
from kernels.tuning import set_tuned, tuned

__all__ = ["elsa_attention", "elsa_attention_reference", "hadamard", "set_tuned", "tuned"]
