"""The network for torch.hub, which needs no clone.

model = torch.hub.load("OWNER/REPOSITORY", "unet", weights="best_model.pth")
model = torch.hub.load("path/of/a/clone", "unet", source="local", n_filters=16, norm="batch")
"""

from medseg.weights import PRETRAINED
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
    if weights is not None and pretrained:
        raise ValueError(f"pretrained and weights={weights}: give one of them")
    weights = PRETRAINED if pretrained else weights
    if weights is None:
        return UNet(**arguments)
    if arguments:
        raise ValueError(f"{', '.join(arguments)}: read from the file of weights; leave it out")
    return load_model(weights).eval()
