"""ELSA's local attention, and what makes its maps, for CPU and GPU.

Depends on torch and triton alone: the folder can be lifted out whole. Without triton (macOS, Windows) the CPU path
works.

    attention.py      elsa_attention: docstring, checks, torch operators
    hadamard.py       hadamard: likewise
    transforms.py     derivatives in both modes, for torch.func too
    checks.py         what both ask of their arguments, and autocast
    backend.py        which path a call takes
    reference.py      the aggregation's definition
    cpu.py            the aggregation on a CPU
    aggregation.py    launches the kernels of aggregation_kernels.py, which are built of window.py
    convolution.py    launches the kernels of convolution_kernels.py, which make the maps
    tuning.py         chooses and remembers launch configurations

One letter means one thing in all files (argument names of the public functions aside).

    B               samples                              b            index of a sample
    H, W; Ho, Wo    height and width; of the output      y, x         row and column of a pixel
    G               heads                                g            index of a head
    C; Q            channels of v; of q and k            c; d         index of a channel; of one within its head
    K               taps, kernel_size ** 2               t = (i, j)   tap, row and column of it in the window
    q, k, v         queries, keys, values                a            attention
    f               filter, a * mul + add                mul, add     ghost filters, lam and gamma applied
    l, lse          logits, their log-sum-exp: max, -log r            kernel_size // 2
    h               q * k                                u, z, slope  before and after GELU, its derivative
    p; s            pixel of a strip or tile; strip      d.., go      gradient of ..; of out
    n               block of groups' channels            o_jc         neighbour in a row and channel in a block
    x               in launchers also any tensor         x1, x2       factors of multiply_kernel's product

    STRIP      neighbouring pixels of a row that share what they load     BLOCK_S    strips of a program
    HEAD_DIM   channels of a head, padded to BLOCK_D                      BLOCK_P    pixels, or patches, of a program
    CHANNELS   channels of a block of groups, padded to BLOCK_C           BLOCK_J    taps of a row in one product or sum
    BLOCK_T    taps of a row, padded                                      ACC        type of the sums
    groups     of samples that share programs                             splits     parts of a sum, one a program
    edge, pitch     on a CPU, zeros around an image; distance between its rows

    p_ pointers   b_ tiles in registers   o_ offsets   m_ masks   s_ strides in elements
"""
from .attention import elsa_attention
from .hadamard import hadamard
from .reference import elsa_attention_reference
from .tuning import set_tuned, tuned

__all__ = ["elsa_attention", "elsa_attention_reference", "hadamard", "set_tuned", "tuned"]
