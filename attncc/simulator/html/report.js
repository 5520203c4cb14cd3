"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const canvas = document.getElementById("mask"), status = document.getElementById("cell"), select = document.getElementById("head");
  const names = ["empty", "partial", "full"];
  const { rows, columns, cell } = data;
  let kinds, image, view, cursor = null, drag = null;

  const unpack = (text) => {
    const bytes = atob(text), found = new Uint8Array(rows * columns);
    for (let i = 0; i < found.length; i++) found[i] = (bytes.charCodeAt(i >> 2) >> ((i & 3) * 2)) & 3;
    return found;
  };
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

  const paint = () => {
    const colors = names.map((name) => rgb(color(`--${name}`)));
    image = document.createElement("canvas");
    image.width = columns; image.height = rows;
    const context = image.getContext("2d"), pixels = context.createImageData(columns, rows);
    kinds.forEach((kind, i) => { const [r, g, b] = colors[kind]; pixels.data.set([r, g, b, 255], i * 4); });
    context.putImageData(pixels, 0, 0);
  };
  const fit = () => { view = { x: 0, y: 0, scale: 1 }; };
  const size = () => ({ width: canvas.clientWidth, height: canvas.clientHeight });
  // Cells are as wide and as high as the canvas allows: masks of few queries and many keys stay readable.
  const step = () => { const s = size(); return [s.width / columns * view.scale, s.height / rows * view.scale]; };

  const draw = () => {
    const s = size(), ratio = devicePixelRatio || 1, context = canvas.getContext("2d"), [w, h] = step();
    canvas.width = s.width * ratio; canvas.height = s.height * ratio;
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = w < 1 || h < 1;
    context.drawImage(image, -view.x * w, -view.y * h, columns * w, rows * h);
    if (cursor) {
      context.strokeStyle = color("--mark"); context.lineWidth = 2;
      context.strokeRect((cursor.column - view.x) * w, (cursor.row - view.y) * h, Math.max(w, 3), Math.max(h, 3));
    }
  };
  const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
  const settle = () => {
    const room = 1 - 1 / view.scale;
    view.x = clamp(view.x, 0, columns * room); view.y = clamp(view.y, 0, rows * room);
    draw();
  };
  const zoom = (factor, x, y) => {
    const [w, h] = step(), column = view.x + x / w, row = view.y + y / h;
    view.scale = clamp(view.scale * factor, 1, Math.max(1, Math.max(rows, columns) / 4));
    const [w2, h2] = step();
    view.x = column - x / w2; view.y = row - y / h2;
    settle();
  };
  const zoomMiddle = (factor) => { const s = size(); zoom(factor, s.width / 2, s.height / 2); };
  const range = (i, n) => (n === 1 ? `${i}` : `${i * n} to ${(i + 1) * n - 1}`);
  const tell = (row, column) => {
    if (row < 0 || column < 0 || row >= rows || column >= columns) return;
    cursor = { row, column };
    status.textContent = `query tile ${range(row, cell[0])}, key tile ${range(column, cell[1])}: ${names[kinds[row * columns + column]]}`;
    draw();
  };
  const at = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  const point = (event) => { const [x, y] = at(event), [w, h] = step(); tell(Math.floor(view.y + y / h), Math.floor(view.x + x / w)); };
  const show = (head) => { kinds = unpack(data.heads[head]); paint(); cursor = null; status.textContent = "\u00a0"; draw(); };

  canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoom(event.deltaY < 0 ? 1.25 : 0.8, ...at(event)); }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => { drag = at(event); canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointerup", () => { drag = null; });
  canvas.addEventListener("pointermove", (event) => {
    if (!drag) return point(event);
    const [x, y] = at(event), [w, h] = step();
    view.x -= (x - drag[0]) / w; view.y -= (y - drag[1]) / h; drag = [x, y];
    settle();
  });
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    if (moves[event.key]) {
      const from = cursor || { row: 0, column: 0 }, [r, c] = moves[event.key];
      tell(clamp(from.row + r, 0, rows - 1), clamp(from.column + c, 0, columns - 1));
    } else if (event.key === "+" || event.key === "=") zoomMiddle(1.5);
    else if (event.key === "-") zoomMiddle(1 / 1.5);
    else if (event.key === "0") { fit(); draw(); }
    else return;
    event.preventDefault();
  });
  document.getElementById("in").addEventListener("click", () => zoomMiddle(1.5));
  document.getElementById("out").addEventListener("click", () => zoomMiddle(1 / 1.5));
  document.getElementById("all").addEventListener("click", () => { fit(); draw(); });
  select.addEventListener("change", () => show(Number(select.value)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { paint(); draw(); });
  new ResizeObserver(draw).observe(canvas);
  fit();
  show(0);
})();
