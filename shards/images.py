"""Image files: what may be ingested is exactly what the engines can read."""

import io
import warnings

from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG")


class ImageError(ValueError):
    """Not a whole image file of an accepted format; the message holds nothing of the file."""


def decoded(data: bytes) -> Image.Image:
    """The pixels of a PNG or JPEG file in RGB, turned as its metadata says.

    Raises:
        ImageError: damaged, cut off, of another format, or larger than Pillow's limit of pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        problem = type(error).__name__  # its message may hold metadata of the file
    except Image.DecompressionBombWarning:
        problem = f"more than {Image.MAX_IMAGE_PIXELS} pixels"
    raise ImageError(f"an image could not be read ({problem}): give whole PNG or JPEG files")
