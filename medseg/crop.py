"""Square crops of images: how many, where, and their pixels."""


def crops_per_epoch(sizes, crop):
    """How often each image is drawn in an epoch: as often as crops would tile it, at least once.

    sizes: int64 tensor (N, 2) of heights and widths. Returns int64 (N,).
    """
    return (sizes.prod(1) / crop**2).round().long().clamp(min=1)


def place_crops(sizes, draws, crop):
    """Top and left of a crop of each image, int64 (n, 2); every place inside is as likely.

    sizes: int64 (n, 2) of heights and widths; draws: (n, 2) uniform in 0..1, 1 excluded. Where a
    side of the image is shorter than the crop, the crop holds all of it, and top or left is
    negative.
    """
    room = sizes - crop
    steps = (draws.double() * (room.abs() + 1)).floor().long()
    return room.clamp(max=0) + steps


def gather_windows(pixels, places, side):
    """Squares of images, uint8 (B, side, side, C); beyond an image its border is repeated.

    pixels: uint8 (P, C), the rows of all images one after the other; places: int64 (B, 5), on the
    CPU: first pixel, height and width of the image, top and left of the square, which has pixels
    of the image in it.
    """
    windows = pixels.new_empty(len(places), side, side, pixels.shape[1])
    # Slices, for an index of every pixel takes ten times as long on a CPU.
    for window, (first, height, width, top, left) in zip(windows, places.tolist(), strict=True):
        image = pixels[first : first + height * width].view(height, width, -1)
        inside = image[max(top, 0) : top + side, max(left, 0) : left + side]
        above, before = max(-top, 0), max(-left, 0)
        below, after = above + inside.shape[0], before + inside.shape[1]
        window[above:below, before:after] = inside
        window[above:below, :before] = inside[:, :1]
        window[above:below, after:] = inside[:, -1:]
        window[:above] = window[above].clone()
        window[below:] = window[below - 1].clone()
    return windows
