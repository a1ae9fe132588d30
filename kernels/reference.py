"""The definition of ELSA's aggregation, one tap at a time: the specification, which everything else must equal.

Source: Zhou et al., "ELSA: Enhanced Local Self-Attention for Vision Transformer", arXiv 2112.12786, sections 3.2, 3.3.
"""
import torch.nn.functional as F


def elsa_attention_reference(v, logits, ghost_mul=None, ghost_add=None, *, kernel_size, dilation=1, stride=1, lam=1,
                             gamma=1, normalize=True):
    """Shapes as in :func:`kernels.elsa_attention`; no checks, no speed, differentiable by autograd.

        a[b,g,t,y,x] = softmax over t of logits[b,g,t,y,x]                   (normalize=False: the logits themselves)
        f[b,c,t,y,x] = a[b,g(c),t,y,x] * mul[c,t]**lam + gamma * add[c,t]    g(c) = c // head width
        out[b,y,x,c] = sum_t v[b, y*stride + (i-r)*dilation, x*stride + (j-r)*dilation, c] * f[b,c,t,y,x]

    with t = i * kernel_size + j and r = kernel_size // 2. v is 0 outside the image, and the taps out there keep their
    share of the softmax.
    """
    B, H, W, C = v.shape
    K, r = kernel_size ** 2, kernel_size // 2
    Ho, Wo = H // stride, W // stride
    if logits is not None:
        a = logits.reshape(B, logits.shape[1] // K, K, Ho, Wo)  # (B, G, K, Ho, Wo)
        a = a.softmax(2) if normalize else a
        a = a.repeat_interleave(C // a.shape[1], dim=1)  # (B, C, K, Ho, Wo)
    padded = F.pad(v, (0, 0, r * dilation, r * dilation, r * dilation, r * dilation))
    out = v.new_zeros(B, Ho, Wo, C)
    for i in range(kernel_size):
        for j in range(kernel_size):
            rows = slice(i * dilation, i * dilation + Ho * stride, stride)
            columns = slice(j * dilation, j * dilation + Wo * stride, stride)
            f = v.new_zeros(B, 1, 1, C)
            if logits is not None:
                mul = _tap(ghost_mul, i, j) ** lam if ghost_mul is not None and lam else 1
                f = f + a[:, :, i * kernel_size + j].permute(0, 2, 3, 1) * mul
            if ghost_add is not None and gamma:
                f = f + gamma * _tap(ghost_add, i, j)
            out = out + padded[:, rows, columns] * f
    return out


def _tap(ghost, i, j):
    """Tap (i, j) of a static (C, ...) or per-sample (B, C, ...) filter, ready to multiply (B, H, W, C)."""
    return ghost[..., i, j].reshape(-1, 1, 1, ghost.shape[-3])
