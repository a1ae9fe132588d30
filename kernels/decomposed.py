"""The aggregation of plain torch operators alone, for programs that are to run without this package: exported files.

Slower than cpu.py, which writes into views; here every tap makes a new sum. No K-fold copy of v is made either.
"""
import torch
import torch.nn.functional as F


def attention(v, logits, mul, add, kernel_size, dilation, stride, normalize):
    """As :func:`kernels.cpu.forward`, any sizes symbolic: out (B, Ho, Wo, C), and an lse of zeros, for nobody."""
    B, H, W, C = v.shape
    Ho, Wo = H // stride, W // stride
    edge = kernel_size // 2 * dilation
    image = v.permute(0, 3, 1, 2)
    heads, out = 1, None
    if logits is not None:
        heads = logits.shape[1] // kernel_size ** 2
        a = logits.unflatten(1, (heads, kernel_size ** 2))  # (B, G, K, Ho, Wo)
        a = (a.softmax(2) if normalize else a).unsqueeze(3)
    if add is not None and add.ndim == 3:
        out = F.conv2d(image, add[:, None], None, stride, edge, dilation, C)[:, :, :Ho, :Wo]
        out = out.unflatten(1, (heads, C // heads))
        add = None
    if logits is not None or add is not None:
        mul, add = (None if x is None else x.reshape(-1, heads, C // heads, kernel_size ** 2, 1, 1)
                    for x in (mul, add))
        padded = F.pad(image, (edge,) * 4).unflatten(1, (heads, C // heads))  # (B, G, head width, H.., W..)
        for t in range(kernel_size ** 2):
            top, left = t // kernel_size * dilation, t % kernel_size * dilation
            v_t = padded[..., top:top + Ho * stride:stride, left:left + Wo * stride:stride]
            f = None if logits is None else a[:, :, t]
            f = f if mul is None else f * mul[..., t, :, :]
            f = f if add is None else add[..., t, :, :] if f is None else f + add[..., t, :, :]
            out = v_t * f if out is None else torch.addcmul(out, v_t, f)
    out = out.flatten(1, 2).permute(0, 2, 3, 1).contiguous()
    return out, v.new_zeros(B, heads, 2, Ho, Wo) if logits is not None and normalize else v.new_zeros(0)
