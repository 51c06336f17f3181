"""What may be asked for: one table of bounds, for one's own files and for what other people send."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds of one call of the processor. Whatever goes beyond one is refused by the bound's name.

    Attributes:
        max_images: images in a call.
        max_bytes: length of an image's file, or of its base64 once decoded.
        max_pixels: width times height of an image.
        max_side: width or height.
        max_decoded_bytes: memory that decoding takes by its size and format: the image, the copies of it
            and what the format's decoder keeps.
        max_segments: segments, chunks, strips, tags and other pieces that an image's file consists of.
        max_metadata: bytes of Exif data, colour profiles, texts and comments, as they are once expanded.
        max_scans: scans of a JPEG.
        max_scanned_samples: samples that all its scans pass over, however little they say of them. A pixel of
            an AVIF's frames counts as 10 and a byte of them as 150, as they take so much longer.
        max_slow_values: pixels and bytes of the forms that are decoded one by one: text PPM, PPM with a
            maximum of its own, BMP with run lengths.
        max_text: characters of all texts, messages, tools and documents of a call.
        max_text_bytes: bytes of all texts, as UTF-8, that become tokens: of rare characters there is a token
            for each byte, and a token takes some 400 bytes of memory until all are made.
        max_texts: texts, conversations and samples of images in a call.
        max_tokens: what `max_length` and `pad_to_multiple_of` may ask for.
        max_tile_side: what `size` may ask for.
        max_tiles: what `max_image_tiles` may ask for.
        max_pixel_values: numbers in the tiles of a call, (B, N, T, 3, t, t).
        max_mask_values: numbers in any other array of a call, of which the largest is the mask, (B, L, N, T).
        max_template_seconds: time that a chat template may take for one conversation.
        max_template_bytes: memory that it may take.
    """

    max_images: int
    max_bytes: int
    max_pixels: int
    max_side: int
    max_decoded_bytes: int
    max_segments: int
    max_metadata: int
    max_scans: int
    max_scanned_samples: int
    max_slow_values: int
    max_text: int
    max_text_bytes: int
    max_texts: int
    max_tokens: int
    max_tile_side: int
    max_tiles: int
    max_pixel_values: int
    max_mask_values: int
    max_template_seconds: float
    max_template_bytes: int


# The most that one image within the limits takes, by `tests/image_costs.py` on a core of a Xeon (Emerald
# Rapids) with Pillow 13, seconds and MiB beside the file itself:
#                                  OWN_FILES     REQUESTS
#   PNG, RGBA of 16 bits           3.3   690     1.5   387
#   PNG, empty chunks              1.4    19     0.3     8
#   JPEG, progressive 4:4:4        3.8   853     1.5   406
#   JPEG, scans without a change   8.2   429     1.4   242
#   WebP                           3.8  1373     1.5   407
#   WebP, lossless, codes by block 10.6 1366     3.2   392
#   TIFF, floats in one strip      3.4  1034     2.2   308
#   PPM with a maximum of its own 13.4    39     1.8     9
#   AVIF                           2.3   875     1.7   322
# Files and words of one's own: mistakes are caught, and nothing that a person meant is refused.
OWN_FILES = Limits(
    max_images=256,
    max_bytes=128 * MIB,
    max_pixels=89_478_485,  # Pillow's own warning limit; an RGB copy is 256 MiB
    max_side=65_535,
    max_decoded_bytes=2048 * MIB,
    max_segments=100_000,
    max_metadata=64 * MIB,
    max_scans=200,
    max_scanned_samples=4_000_000_000,
    max_slow_values=8_000_000,
    max_text=16 * MIB,
    max_text_bytes=32 * MIB,
    max_texts=2**16,
    max_tokens=2**20,
    max_tile_side=2048,
    max_tiles=64,
    max_pixel_values=2**30,
    max_mask_values=2**28,
    max_template_seconds=5.0,
    max_template_bytes=512 * MIB,
)
# What a network brings: enough for photographs of today's telephones, and for the model's whole context.
REQUESTS = Limits(
    max_images=16,
    max_bytes=20 * MIB,
    max_pixels=50_000_000,
    max_side=16_384,
    max_decoded_bytes=400 * MIB,
    max_segments=10_000,
    max_metadata=8 * MIB,
    max_scans=32,
    max_scanned_samples=600_000_000,
    max_slow_values=1_000_000,
    max_text=2 * MIB,
    max_text_bytes=MIB,
    max_texts=64,
    max_tokens=2**17,
    max_tile_side=1024,
    max_tiles=16,
    max_pixel_values=2**27,
    max_mask_values=2**25,
    max_template_seconds=2.0,
    max_template_bytes=256 * MIB,
)
