"""Drawing what a model sees into a photograph: label maps, boxes and masks, legends."""
import colorsys
import unicodedata
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
LINE = 20  # pixels from a line of text to the next
WIDTH, HEIGHT = 256, 4096  # small photographs are enlarged to this width, but not beyond this height


@cache
def font():
    return ImageFont.truetype(str(FONT), 13)


@cache
def glyphs():
    return FT2Font(str(FONT))


def writable(text):
    """The text in one line, with what the font does not have as its number, U+4E2D."""
    return "".join(letter if letter.isprintable() and glyphs().get_char_index(ord(letter)) else f"U+{ord(letter):04X}"
                   for letter in unicodedata.normalize("NFC", text))


def colour(i):
    """A colour (r, g, b) for class i: hues a golden angle apart, so that neighbouring numbers differ most."""
    hue, saturation, value = i * 0.618034 % 1, (0.9, 0.6)[i // 7 % 2], (1.0, 0.75)[i // 14 % 2]
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))


def draw_label_map(pixels, label_map, num_classes):
    """The image under the colours of its classes. pixels: (H, W, 3) uint8, label_map: (H, W) class indices."""
    palette = np.array([colour(i) for i in range(num_classes)], np.uint8)
    return Image.blend(Image.fromarray(pixels), Image.fromarray(palette[label_map]), 0.55)


def draw_objects(pixels, objects, masks):
    """The image, small ones enlarged, with the masks, boxes and names of objects, the first on top. Names that do not
    fit into it stand beside it.

    pixels: (H, W, 3) uint8. objects: dicts with class, score and box (x0, y0, x1, y1 in pixels). masks: a (H, W) bool
    array each.
    """
    painted = pixels.astype(np.float32)
    for i in reversed(range(len(objects))):
        painted[masks[i]] = 0.5 * painted[masks[i]] + 0.5 * np.array(colour(i))
    canvas = Image.fromarray(painted.astype(np.uint8))
    scale = enlargement(canvas)
    canvas = canvas.resize((canvas.width * scale, canvas.height * scale), Image.NEAREST)
    texts = [writable(f"{entry['class']} {100 * entry['score']:.0f}%") for entry in objects]
    widths = [font().getlength(text) + 4 for text in texts]
    inside = canvas.height >= LINE and max(widths, default=0) <= canvas.width
    draw = ImageDraw.Draw(canvas)
    for i in reversed(range(len(objects))):
        x0, y0, x1, y1 = (scale * side for side in objects[i]["box"])
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour(i), width=2)
        if inside:
            left, top = max(0, min(x0, canvas.width - widths[i])), max(0, y0 - 18)
            draw.rectangle((left, top, left + widths[i], top + 18), fill=colour(i))
            draw.text((left + 2, top + 1), texts[i], fill="black", font=font())
    return canvas if inside else with_legend(canvas, [(colour(i), text) for i, text in enumerate(texts)])


def with_legend(image, lines):
    """The image, small ones enlarged, with a strip to its right.

    lines: [(colour or None, text)], a text a line, after a square of its colour if it has one.
    """
    scale = enlargement(image)
    image = image.resize((image.width * scale, image.height * scale), Image.NEAREST)
    lines = [(fill, writable(text)) for fill, text in lines]
    width = 36 + max((int(font().getlength(text)) for _, text in lines), default=0)
    canvas = Image.new("RGB", (image.width + width, max(image.height, LINE * len(lines) + 8)), "white")
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for i, (fill, text) in enumerate(lines):
        top = 4 + LINE * i
        if fill:
            draw.rectangle((image.width + 8, top + 2, image.width + 22, top + 16), fill=fill, outline="black")
        draw.text((image.width + (28 if fill else 8), top + 1), text, fill="black", font=font())
    return canvas


def enlargement(image):
    """The whole number by which a small image is enlarged: to WIDTH, but for what would be higher than HEIGHT."""
    return max(1, min(-(-WIDTH // image.width), HEIGHT // image.height))
