"""Check that something is drawn in a picture."""

import matplotlib.image


def check_picture(path):
    """Check a PNG and return it as an array (rows, columns, channels)."""
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 600
    assert pixels[..., :3].std() > 0.02
    return pixels
