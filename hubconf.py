"""The network for torch.hub, which needs no clone.

model = torch.hub.load("OWNER/REPOSITORY", "unet", weights="best_model.pth")
model = torch.hub.load("path/of/a/clone", "unet", source="local", n_filters=16, norm="batch")
"""

from medseg.pretrained import PRETRAINED
from net import UNet, load_model

dependencies = ["torch", "numpy", "PIL", "tqdm"]


def unet(pretrained=False, *, weights=None, **arguments):
    """A `net.UNet`: new, or with weights, and then ready to predict (`eval()`).

    pretrained: with the weights that come with the repository. weights: path of a file of
    weights, ours or the tutorial's. arguments: of `net.UNet`, for a new one; otherwise they are
    read from the file.
    The input is normalised as by `data.normalize`, the output are probabilities.
    Raises FileNotFoundError where the file is missing; ValueError for what is no UNet.
    """
    if not pretrained and weights is None:
        return UNet(**arguments)
    if pretrained and weights is not None:
        raise ValueError(f"pretrained and weights={weights}: give one of them")
    if arguments:
        names = ", ".join(arguments)
        raise ValueError(f"{names}: read from the file of weights; leave it out")
    if pretrained:
        weights = PRETRAINED
        if not weights.exists():
            raise FileNotFoundError(
                f"{weights}: this version of the repository has no pretrained weights; "
                "train with `python train.py` and give weights=PATH"
            )
    return load_model(weights).eval()
