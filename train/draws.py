"""Random numbers for the augmentation of one image."""
import math

import numpy as np

NUMBERS = 64  # raw ones, of 32 bits; an image needs 36 at most
_twister = np.random.MT19937()  # reused: making one takes longer than seeding it
_seeder = np.random.RandomState(_twister)  # seeds it as torch does its own


class Draws:
    """What torch's generator on the CPU draws after manual_seed(seed), number for number: the same Mersenne twister,
    without a tensor for every number, which takes longer than most of what is done with it."""

    def __init__(self, seed):
        _seeder.seed(seed & 0xFFFFFFFF)
        self._raw = iter(_twister.random_raw(NUMBERS).tolist())
        self._spare = None  # of two normal deviates, the second

    def uniform(self, low=0.0, high=1.0):
        """torch.empty(1).uniform_(low, high), a float32."""
        share = (next(self._raw) & 0xFFFFFF) * 2.0 ** -24
        if (low, high) == (0.0, 1.0):
            return share
        low, high = np.float32(low), np.float32(high)
        return float(np.float32(share * float(high - low) + float(low)))

    def below(self, count):
        """torch.randint(count, ())"""
        return next(self._raw) % count

    def normal(self):
        """torch.randn(())"""
        value, self._spare = self._spare, None
        if value is None:
            angle, share = 2 * math.pi * self._double(), self._double()
            radius = math.sqrt(-2 * math.log1p(-share))
            value, self._spare = radius * math.cos(angle), radius * math.sin(angle)
        return float(np.float32(value))

    def _double(self):
        return (((next(self._raw) << 32) | next(self._raw)) & (1 << 53) - 1) * 2.0 ** -53
