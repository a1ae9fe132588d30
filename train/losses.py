"""What is minimised."""
import torch.nn.functional as F


def mixed_cross_entropy(logits, labels, own, label_smoothing):
    """Cross-entropy against `own` of the image's label and the rest of its partner's, see data.mix. logits (B, C), labels (B,)."""
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    if own == 1:
        return loss
    return own * loss + (1 - own) * F.cross_entropy(logits, labels.flip(0), label_smoothing=label_smoothing)


def token_cross_entropy(logits, token_logits, labels, targets, own, label_smoothing, dense_weight):
    """Loss of the class token plus dense_weight times that of the tokens. Source: Jiang et al., arXiv 2104.10858.

    logits: (B, C). token_logits: (B, h, w, C), those that come from one image together, as VOLO returns them. own: share of an
    image's own tokens behind its class token, see tokens.draw_swap. targets: (class targets (B, C), token targets (B, h, w, C)) of
    tokens.dense_targets, or None: the label (B,) of an image is that of its tokens.
    """
    tokens = token_logits.flatten(0, 2)
    if targets is None:
        spread = labels[:, None, None].expand(token_logits.shape[:3]).flatten()
        return mixed_cross_entropy(logits, labels, own, label_smoothing) \
            + dense_weight * F.cross_entropy(tokens, spread, label_smoothing=label_smoothing)
    class_targets, token_targets = targets
    mixed = own * class_targets + (1 - own) * class_targets.flip(0)
    return F.cross_entropy(logits, mixed) + dense_weight * F.cross_entropy(tokens, token_targets.flatten(0, 2))
