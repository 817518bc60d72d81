"""The masks of a volume, slice by slice."""

import numpy as np

from medseg.full_size import full_size_levels, sum_probabilities


class VolumeMasks:
    """What is kept of the predictions of the slices of a `medseg.formats.nifti.Volume`.

    write: names of `medseg.results.folder.WRITTEN`. masks: class numbers, uint8 (N, H, W).
    class_masks: of classes that overlap the mask of each, bool (C, N, H, W), else None. highest:
    the highest probability of each class, (C,); sums: what `sum_probabilities` gives, (C,), both
    over all slices. levels: uint16 (C, N, H, W), what `full_size_levels` makes of each slice, where
    `write` has the probabilities, else ().
    """

    def __init__(self, volume, n_classes, write=()):
        self.volume, self.class_masks, self._count = volume, None, 0
        self.masks = np.zeros((len(volume), *volume[0].shape), np.uint8)
        self.highest, self.sums, self.levels = np.zeros(n_classes), np.zeros(n_classes), ()
        if "probability" in write:
            self.levels = np.zeros((n_classes, *self.masks.shape), np.uint16)

    def add(self, labels, probabilities, masks=None):
        """Keep those of the next slice: uint8 (H, W); float32 (C, S, S); bool (C, H, W) or None."""
        self.masks[self._count] = labels
        if masks is not None:
            if self.class_masks is None:
                self.class_masks = np.zeros((len(masks), *self.masks.shape), bool)
            self.class_masks[:, self._count] = masks
        self.highest = np.maximum(self.highest, probabilities.max((1, 2)))
        own = labels if masks is None else masks
        self.sums = self.sums + sum_probabilities(own, probabilities)
        if len(self.levels):
            size = labels.shape[::-1]
            self.levels[:, self._count] = [full_size_levels(one, size) for one in probabilities]
        self._count += 1
