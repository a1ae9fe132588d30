"""Drawing what a model sees into a photograph: label maps, boxes and masks, legends."""
import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def colour(i):
    """A colour (r, g, b) for class i: hues a golden angle apart, so that neighbouring numbers differ most."""
    hue, saturation, value = i * 0.618034 % 1, (0.9, 0.6)[i // 7 % 2], (1.0, 0.75)[i // 14 % 2]
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))


def draw_label_map(pixels, label_map, num_classes):
    """The image under the colours of its classes. pixels: (H, W, 3) uint8, label_map: (H, W) class indices."""
    palette = np.array([colour(i) for i in range(num_classes)])
    return Image.fromarray((0.45 * pixels + 0.55 * palette[label_map]).astype(np.uint8))


def draw_objects(pixels, objects, masks):
    """The image, at least 256 pixels wide, with the masks, boxes and names of objects, the first on top.

    pixels: (H, W, 3) uint8. objects: dicts with class, score and box (x0, y0, x1, y1 in pixels). masks: a (H, W) bool
    array each.
    """
    painted = pixels.astype(np.float32)
    for i in reversed(range(len(objects))):
        painted[masks[i]] = 0.5 * painted[masks[i]] + 0.5 * np.array(colour(i))
    canvas = Image.fromarray(painted.astype(np.uint8))
    scale = max(1, -(-256 // canvas.width))
    canvas = canvas.resize((canvas.width * scale, canvas.height * scale), Image.NEAREST)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for i in reversed(range(len(objects))):
        x0, y0, x1, y1 = (scale * side for side in objects[i]["box"])
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour(i), width=2)
        text = f"{objects[i]['class']} {100 * objects[i]['score']:.0f}%"
        width = font.getlength(text) + 4
        left, top = max(0, min(x0, canvas.width - width)), max(0, y0 - 18)
        draw.rectangle((left, top, left + width, top + 18), fill=colour(i))
        draw.text((left + 2, top), text, fill="black", font=font)
    return canvas


def with_legend(image, lines):
    """The image, at least 256 pixels wide, with a strip to its right.

    lines: [(colour or None, text)], a text a line, after a square of its colour if it has one.
    """
    if image.width < 256:
        image = image.resize((256, round(256 * image.height / image.width)), Image.NEAREST)
    font = ImageFont.load_default(14)
    width = 36 + max(int(font.getlength(text)) for _, text in lines)
    canvas = Image.new("RGB", (image.width + width, max(image.height, 20 * len(lines) + 8)), "white")
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for i, (fill, text) in enumerate(lines):
        top = 4 + 20 * i
        if fill:
            draw.rectangle((image.width + 8, top + 2, image.width + 22, top + 16), fill=fill, outline="black")
        draw.text((image.width + (28 if fill else 8), top), text, fill="black", font=font)
    return canvas
