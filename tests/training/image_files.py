"""Writes one small image file per format, mode and depth, and computes its 8-bit RGB pixels with NumPy alone."""

import io
import itertools
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, features

SIZE = 16
RNG = np.random.default_rng(0)
ORIENT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
"""How the stored pixels are turned to show an image with each EXIF orientation."""


@dataclass(frozen=True)
class ImageFile:
    name: str  # format, mode and depth, for messages
    suffix: str
    content: bytes
    expected: np.ndarray | None  # (SIZE, SIZE, 3), from 0 to 255; None: the file cannot be decoded right


def noise(*channels: int, high: int = 256) -> np.ndarray:
    return RNG.integers(0, high, (SIZE, SIZE, *channels))


def blocks(*channels: int) -> np.ndarray:
    """Four squares of one color each, which JPEG and AVIF keep but for rounding in YCbCr."""
    return RNG.integers(80, 176, (2, 2, *channels)).repeat(SIZE // 2, 0).repeat(SIZE // 2, 1)


def gray_to_rgb(gray: np.ndarray) -> np.ndarray:
    return gray[..., None].repeat(3, 2).astype(float)


def on_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colors and alpha from 0 to 255."""
    share = alpha[..., None] / 255
    return color * share + 255 * (1 - share)


def cmyk_to_rgb(cmyk: np.ndarray) -> np.ndarray:
    return (255 - cmyk[..., :3]) * (255 - cmyk[..., 3:]) / 255


def ycbcr_to_rgb(ycbcr: np.ndarray) -> np.ndarray:
    y, cb, cr = np.moveaxis(ycbcr.astype(float), -1, 0)
    rgb = [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)]
    return np.clip(np.stack(rgb, -1), 0, 255)


def lab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D50) with L from 0 to 255 and signed a and b, to sRGB."""
    lightness, a, b = lab[..., 0] * (100 / 255), lab[..., 1].astype(float), lab[..., 2].astype(float)
    y = (lightness + 16) / 116
    f = np.stack([y + a / 500, y, y - b / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.96422, 1, 0.82521)
    to_srgb = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = np.clip(xyz @ np.array(to_srgb).T, 0, 1)
    return 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def pack(levels: np.ndarray, bits: int) -> bytes:
    """Rows of integers of 1, 2, 4, 8, 12 or 16 bits, big-endian."""
    digits = (levels[..., None] >> np.arange(bits)[::-1]) & 1
    return np.packbits(digits.reshape(len(levels), -1), axis=1).tobytes()


def png(bits: int, color: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG file with the color type of the specification; ``chunks`` precede the pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    length = len(rows) // SIZE
    pixels = zlib.compress(b"".join(b"\0" + rows[length * i : length * (i + 1)] for i in range(SIZE)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIZE, SIZE, bits, color, 0, 0, 0))
    extra = b"".join(chunk(name.encode(), content) for name, content in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tiff(
    photometric: int,
    bits: int,
    strips: Sequence[bytes],
    channels: int = 1,
    order: str = "<",
    sample_format: int = 1,
    extra: int | None = None,
    compress: bool = False,
) -> bytes:
    """A TIFF file; several strips are separate planes of the channels."""
    strips = [zlib.compress(strip) for strip in strips] if compress else strips
    content = b"".join(strips)
    offsets = [8 + sum(map(len, strips[:i])) for i in range(len(strips))]
    tags = {
        256: [SIZE],
        257: [SIZE],
        258: [bits] * channels,
        259: [8 if compress else 1],
        262: [photometric],
        273: offsets,
        277: [channels],
    }
    tags |= {278: [SIZE], 279: [len(strip) for strip in strips], 284: [1 if len(strips) == 1 else 2]}
    tags |= {338: [extra]} if extra is not None else {}
    tags[339] = [sample_format] * channels
    start, values = 8 + len(content), b""
    directory = struct.pack(f"{order}H", len(tags))
    for tag, numbers in tags.items():
        packed = struct.pack(f"{order}{len(numbers)}H", *numbers)
        directory += struct.pack(f"{order}HHI", tag, 3, len(numbers))
        if len(packed) <= 4:
            directory += packed.ljust(4, b"\0")
        else:
            directory += struct.pack(f"{order}I", start + 2 + 12 * len(tags) + 4 + len(values))
            values += packed
    header = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start)
    return header + content + directory + bytes(4) + values


def list_pillow_files() -> Iterator[ImageFile]:
    """Files that Pillow writes, in each EXIF orientation that the format stores."""

    def save(
        suffix: str,
        mode: str,
        array: np.ndarray,
        expected: np.ndarray,
        palette: np.ndarray | None = None,
        **options: Any,
    ) -> Iterator[ImageFile]:
        dtypes = {"I": np.int32, "F": np.float32, "I;16": "<u2", "I;16B": ">u2"}
        image = Image.frombytes(mode, (SIZE, SIZE), np.ascontiguousarray(array, dtypes.get(mode, np.uint8)).tobytes())
        if palette is not None:
            image.putpalette(palette.astype(np.uint8).tobytes())
        for orientation, orient in ORIENT.items():
            if orientation == 1 or suffix in ("png", "tif", "jpg", "jfif", "webp", "avif"):
                exif = Image.Exif()
                exif[274] = orientation
                every = options | ({"exif": exif} if orientation > 1 else {})
                buffer = io.BytesIO()
                image.save(buffer, Image.registered_extensions()[f".{suffix}"], **every)
                name = f"{suffix} {mode} {' '.join(options)} orientation {orientation}"
                yield ImageFile(name, suffix, buffer.getvalue(), orient(expected))

    gray, rgb, alpha, indices, palette = noise(), noise(3), noise(), noise(), RNG.integers(0, 256, (256, 3))
    gray_alpha, rgb_alpha = np.stack([gray, alpha], -1), np.concatenate([rgb, alpha[..., None]], -1)
    alphas, deep, cmyk, ycbcr = RNG.integers(0, 256, 256), noise(high=65536), noise(4), noise(3)
    bits = np.packbits(gray > 127, axis=1)
    black_or_white, on_gray, on_rgb = gray_to_rgb(255 * (gray > 127)), gray_to_rgb(gray), rgb.astype(float)
    for suffix in ("png", "tif", "gif", "bmp", "pbm", "jp2"):
        if suffix not in ("gif", "jp2"):
            yield from save(suffix, "1", bits, black_or_white)
        if suffix != "pbm":
            yield from save(suffix, "L", gray, on_gray)
        if suffix not in ("gif", "pbm"):
            yield from save(suffix, "RGB", rgb, on_rgb)
        if suffix in ("png", "tif", "gif", "bmp"):
            yield from save(suffix, "P", indices, palette[indices].astype(float), palette)
        if suffix in ("png", "tif", "jp2"):
            yield from save(suffix, "LA", gray_alpha, on_white(on_gray, alpha))
            yield from save(suffix, "RGBA", rgb_alpha, on_white(rgb, alpha))
            yield from save(suffix, "I;16", deep, gray_to_rgb(deep / 257))
    yield from save("webp", "RGB", rgb, on_rgb, lossless=True)
    yield from save("webp", "RGBA", rgb_alpha, on_white(rgb, alpha), lossless=True, exact=True)
    for suffix in ("png", "gif"):
        visible = on_white(palette[indices], 255 * (indices != indices[0, 0]))
        yield from save(suffix, "P", indices, visible, palette, transparency=int(indices[0, 0]))
    yield from save(
        "png", "P", indices, on_white(palette[indices], alphas[indices]), palette, transparency=bytes(alphas.tolist())
    )
    yield from save("png", "L", gray, on_white(on_gray, 255 * (gray != gray[0, 0])), transparency=int(gray[0, 0]))
    key = tuple(int(value) for value in rgb[0, 0])
    yield from save("png", "RGB", rgb, on_white(rgb, 255 * (rgb != key).any(-1)), transparency=key)
    another = [Image.new("RGB", (SIZE, SIZE), "red")]
    for suffix in ("png", "tif"):
        yield from save(suffix, "RGB", rgb, on_rgb, save_all=True, append_images=another)
    yield from save("webp", "RGB", rgb, on_rgb, lossless=True, save_all=True, append_images=another)
    yield from save("gif", "L", gray, on_gray, save_all=True, append_images=another)
    pixels = np.stack([indices, alpha], -1)
    yield from save("tif", "PA", pixels, on_white(palette[indices], alpha), palette)
    yield from save("tif", "CMYK", cmyk, cmyk_to_rgb(cmyk))
    yield from save("tif", "YCbCr", ycbcr, ycbcr_to_rgb(ycbcr))
    lab = np.stack([gray, *RNG.integers(-60, 61, (2, *gray.shape))], -1)
    yield from save("tif", "LAB", lab, lab_to_rgb(lab))
    yield from save("tif", "I;16B", deep, gray_to_rgb(deep / 257))
    yield from save("tif", "I", deep, gray_to_rgb(deep / 257), compression="tiff_lzw")
    for suffix in ("tif", "pfm"):
        yield from save(suffix, "F", deep / 65535, gray_to_rgb(deep / 257))
    for suffix in ("jpg", "jfif"):
        squares = {"L": blocks(), "RGB": blocks(3), "CMYK": blocks(4)}
        yield from save(suffix, "L", squares["L"], gray_to_rgb(squares["L"]), quality=100)
        yield from save(suffix, "RGB", squares["RGB"], squares["RGB"].astype(float), quality=100, subsampling=0)
        yield from save(suffix, "CMYK", squares["CMYK"], cmyk_to_rgb(squares["CMYK"]), quality=100)
    if features.check("avif"):
        color, opacity = blocks(3), blocks()
        pixels = np.concatenate([color, opacity[..., None]], -1)
        yield from save("avif", "RGB", color, color.astype(float), quality=100, subsampling="4:4:4")
        yield from save("avif", "RGBA", pixels, on_white(color, opacity), quality=100, subsampling="4:4:4")


def list_raw_files() -> Iterator[ImageFile]:
    """Files of depths and layouts that Pillow does not write."""

    def raw(name: str, content: bytes, expected: np.ndarray | None) -> ImageFile:
        return ImageFile(name, name.split()[0], content, expected)

    rgb, alpha, deep_rgb, deep_alpha = noise(3), noise(), noise(3, high=65536), noise(high=65536)
    for bits in (1, 2, 4, 8, 16):
        white = 2**bits - 1
        gray = noise(high=white + 1)
        on_gray, packed = gray_to_rgb(gray * (255 / white)), pack(gray, bits)
        yield raw(f"png gray {bits}", png(bits, 0, packed), on_gray)
        key = struct.pack(">H", gray[0, 0])
        visible = on_white(on_gray, 255 * (gray != gray[0, 0]))
        yield raw(f"png gray {bits} with transparent value", png(bits, 0, packed, tRNS=key), visible)
        if bits < 16:
            palette, alphas = RNG.integers(0, 256, (white + 1, 3)), RNG.integers(0, 256, white + 1)
            chunks = {"PLTE": bytes(palette.ravel().tolist())}
            yield raw(f"png palette {bits}", png(bits, 3, packed, **chunks), palette[gray].astype(float))
            visible = on_white(palette[gray], alphas[gray])
            chunks["tRNS"] = bytes(alphas.tolist())
            yield raw(f"png palette {bits} with alpha", png(bits, 3, packed, **chunks), visible)
            yield raw(f"tif white is zero {bits}", tiff(0, bits, [packed]), 255 - on_gray)
            yield raw(f"tif black is zero {bits}", tiff(1, bits, [packed]), on_gray)
    deep = np.concatenate([deep_rgb, deep_alpha[..., None]], -1)
    yield raw("png RGB 16", png(16, 2, pack(deep_rgb, 16)), deep_rgb / 257)
    key = struct.pack(">3H", *deep_rgb[0, 0])
    yield raw("png RGB 16 with transparent color", png(16, 2, pack(deep_rgb, 16), tRNS=key), None)
    yield raw("png RGBA 16", png(16, 6, pack(deep, 16)), on_white(deep_rgb / 257, deep_alpha / 257))
    gray_alpha = deep[..., 2:]
    yield raw(
        "png LA 16", png(16, 4, pack(gray_alpha, 16)), on_white(gray_to_rgb(gray_alpha[..., 0] / 257), deep_alpha / 257)
    )
    twelve = noise(high=4096)
    yield raw("tif gray 12", tiff(1, 12, [pack(twelve, 12)]), gray_to_rgb(twelve * (255 / 4095)))
    premultiplied = rgb * alpha[..., None] // 255
    expected = premultiplied + 255.0 - alpha[..., None]
    for order, compress in itertools.product("<>", (False, True)):
        layout = f"{order}{' compressed' if compress else ''}"
        encode = partial(tiff, order=order, compress=compress)
        gray, small = noise(high=65536), noise(high=256)
        samples = {
            "16": (1, 16, 1, gray.astype(f"{order}u2"), gray_to_rgb(gray / 257)),
            "signed 32": (1, 32, 2, gray.astype(f"{order}i4"), gray_to_rgb(gray / 257)),
            "float": (1, 32, 3, (gray / 65535).astype(f"{order}f4"), gray_to_rgb(gray / 257)),
            "float, white is zero": (0, 32, 3, (gray / 65535).astype(f"{order}f4"), 255 - gray_to_rgb(gray / 257)),
            "signed 8": (1, 8, 2, small.astype("i1"), None),
            "signed 16": (1, 16, 2, small.astype(f"{order}i2"), None),
            "signed 32, negative": (1, 32, 2, (gray - 40000).astype(f"{order}i4"), None),
            "signed 32, small": (1, 32, 2, small.astype(f"{order}i4"), None),
            "signed 32, large": (1, 32, 2, (gray * 3).astype(f"{order}i4"), None),
            "float to 255": (1, 32, 3, small.astype(f"{order}f4"), None),
            "float below 0": (1, 32, 3, (gray / 65535 - 0.5).astype(f"{order}f4"), None),
            "float with NaN": (1, 32, 3, np.where(small == small[0, 0], np.nan, 0.5).astype(f"{order}f4"), None),
            "float 64": (1, 64, 3, (gray / 65535).astype(f"{order}f8"), None),
        }
        if order == "<":  # Pillow does not open the others
            samples["unsigned 32"] = (1, 32, 1, gray.astype("<u4"), gray_to_rgb(gray / 257))
            samples["16, white is zero"] = (0, 16, 1, gray.astype("<u2"), 255 - gray_to_rgb(gray / 257))
        for name, (photometric, bits, sample_format, array, pixels) in samples.items():
            content = encode(photometric, bits, [array.tobytes()], sample_format=sample_format)
            is_swapped = compress and order == ">" and bits == 32  # by Pillow, once too often
            yield raw(f"tif gray {name} {layout}", content, None if is_swapped else pixels)
        stored = deep_rgb.astype(f"{order}u2")
        yield raw(f"tif RGB 16 {layout}", encode(2, 16, [stored.tobytes()], 3), deep_rgb / 257)
        planes = [stored[..., i].tobytes() for i in range(3)]
        yield raw(f"tif RGB 16 in planes {layout}", encode(2, 16, planes, 3), deep_rgb / 257 if compress else None)
        planes = [rgb[..., i].astype(np.uint8).tobytes() for i in range(3)]
        yield raw(f"tif RGB 8 in planes {layout}", encode(2, 8, planes, 3), rgb.astype(float))
        stored = deep.astype(f"{order}u2")
        pixels = on_white(deep_rgb / 257, deep_alpha / 257)
        yield raw(f"tif RGBA 16 {layout}", encode(2, 16, [stored.tobytes()], 4, extra=2), pixels)
        yield raw(f"tif CMYK 16 {layout}", encode(5, 16, [stored.tobytes()], 4), cmyk_to_rgb(deep / 257))
        stored = np.concatenate([premultiplied, alpha[..., None]], -1).astype(np.uint8)
        yield raw(f"tif RGBA premultiplied {layout}", encode(2, 8, [stored.tobytes()], 4, extra=1), expected)
        stored = np.stack([premultiplied[..., 0], alpha], -1).astype(np.uint8)
        content = encode(1, 8, [stored.tobytes()], 2, extra=1)
        yield raw(f"tif LA premultiplied {layout}", content, gray_to_rgb(expected[..., 0]))
    for name, magic in (("pgm gray", b"P5"), ("ppm RGB", b"P6")):
        for white in (255, 1023, 65535):
            levels = noise(*([3] if name == "ppm RGB" else []), high=white + 1)
            header = b"%s %d %d %d\n" % (magic, SIZE, SIZE, white)
            content = header + levels.astype(np.uint8 if white == 255 else ">u2").tobytes()
            pixels = levels * (255 / white)
            yield raw(f"{name} {white}", content, pixels if name == "ppm RGB" else gray_to_rgb(pixels))
    yield raw("pgm dark", b"P5 %d %d 65535\n" % (SIZE, SIZE) + bytes([0, 9]) * SIZE**2, gray_to_rgb(noise() * 0.0))
    yield raw("png truncated", png(8, 0, pack(alpha, 8))[:-40], None)
    yield raw("jpg empty", b"", None)
    yield raw("webp text", b"not an image", None)


def list_image_files() -> list[ImageFile]:
    return [*list_pillow_files(), *list_raw_files()]
