"""Images: decode untrusted image files."""

import io
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mnist_jax.inference.parts import Box

MAX_BYTES = 2**26
MAX_PIXELS = 2**26  # Phone cameras have up to 50 million.
SIDE_PX = 512  # Larger images are scaled down first.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND")  # what the pixels and the orientation depend on

Image.MAX_IMAGE_PIXELS = None  # Pillow would print a warning; `decode` has its own limit.


class UnreadableImageError(ValueError):
    """A file contains no usable digit; the message is the reason, `problem` its kind, `places` those of its digits."""

    problem = "unreadable"
    places: Sequence[Box] = ()


def decode(content: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the pixels of an image file, at most SIDE_PX a side: RGBA, [H, W, 4] in [0, 1]."""
    if not content:
        raise UnreadableImageError("it is empty")
    if len(content) > MAX_BYTES:
        raise UnreadableImageError(f"it has more than {MAX_BYTES / 1e6:.0f} MB")
    try:
        with Image.open(io.BytesIO(without_metadata(content)), formats=FORMATS) as file:
            if file.width * file.height > max_pixels:
                limit = f"{max_pixels / 1e6:.0f} million"
                raise UnreadableImageError(f"it has {file.width}×{file.height} pixels, more than {limit}")
            file.draft("RGB", (SIDE_PX, SIDE_PX))  # JPEG can be decoded at a fraction of its size.
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith(("I", "F")):  # 16 or 32 bits per pixel; `convert` would clip them.
                image = Image.fromarray(as_bytes(np.asarray(image, np.float64)))
            image = image.convert("RGBA")
            image.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.HAMMING)
            pixels = np.asarray(image, np.float32) / 255
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        if content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
            raise UnreadableImageError("it is HEIC; convert it to JPEG: heif-convert IN.heic OUT.jpg") from error
        raise UnreadableImageError(f"it is none of {', '.join(FORMATS)}, or it is corrupt") from error
    except Exception as error:  # Pillow raises many types for corrupt files.
        raise UnreadableImageError(f"it is corrupt: {error}") from error
    if has_16_bits(content):  # Pillow keeps the upper 8 bits, of which data of 9 to 12 bits uses few.
        brightest = pixels[..., :3].max()
        pixels[..., :3] /= min(level for level in (1 / 255, 3 / 255, 7 / 255, 15 / 255, 1) if brightest <= level)
    return pixels


def as_bytes(values: np.ndarray) -> np.ndarray:
    """Return values [H, W] as uint8. Integers may use fewer bits than they have: 12-bit data has values below 4,096."""
    values = np.nan_to_num(values, posinf=0, neginf=0)
    lowest, highest = min(0.0, values.min()), values.max()
    if highest > 1:
        highest = 2 ** max(8, np.ceil(np.log2(highest + 1))) - 1
    return np.round(255 * np.clip((values - lowest) / max(highest - lowest, 1e-9), 0, 1)).astype(np.uint8)


def has_16_bits(content: bytes) -> bool:
    """Return whether a file is a PNG file with 16 bits per channel and several channels."""
    return content.startswith(PNG_SIGNATURE) and len(content) > 25 and content[24] == 16 and content[25] != 0


def without_metadata(content: bytes) -> bytes:
    """Return a PNG file without texts and colour profiles, other files as they are.

    Pillow refuses files with more than 1 MB of text or with a broken profile. The pixels do not depend on them.
    """
    if not content.startswith(PNG_SIGNATURE):
        return content
    kept, start = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while start + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, start)
        end = start + 12 + length
        if kind in PNG_CHUNKS:
            kept.append(content[start:end])
        start = end
    return b"".join(kept)
