// The text that stands out least from what is painted behind its middle (WCAG 2.2, 1.4.3), as
// [contrast, text]. It is a function for Playwright's page.evaluate.
() => {
  const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);

  // Paint over what is there; the relative luminance then, plus 0.05.
  function paint(colour, opacity = 1) {
    pen.fillStyle = "transparent"; // in case the colour is "none"
    pen.fillStyle = colour;
    pen.globalAlpha = opacity;
    pen.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map((value) => linear(value / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  }

  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const range = document.createRange();
  while (texts.nextNode()) {
    const text = texts.currentNode;
    range.selectNode(text);
    const [box] = range.getClientRects();
    if (!box?.width || !text.data.trim()) continue;
    const layers = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    if (!layers.length) continue; // beyond the window
    let back = paint(getComputedStyle(document.documentElement).backgroundColor);
    for (const layer of layers.reverse()) {
      const { fill, opacity, backgroundColor } = getComputedStyle(layer);
      back = paint(layer.tagName === "rect" ? fill : backgroundColor, opacity);
    }
    const style = getComputedStyle(text.parentElement);
    const ink = paint(text.parentElement.closest("svg") ? style.fill : style.color);
    found.push([Math.max(ink, back) / Math.min(ink, back), text.data]);
  }
  return found.sort((one, other) => one[0] - other[0])[0];
}
