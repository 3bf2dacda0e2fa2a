// The face of the explorers. A model holds what there is to see; this file draws it and tells the model what the reader chose.
//   live: the model is anywidget's, and Python answers new settings with a new view     -> render
//   page: the model is a table of panels that were computed before, no Python is asked  -> start, page
// scene (fixed): title, grid [t, h, w], size [H, W], frames (data URLs), parts, controls.  settings: control name -> value.
// view: part -> panel, and a panel holds one character per token: its class (0 seen, 1 hidden, 2 hidden and decoded), its heat (0 … f);
// where it shows something else than the clip, it brings frames of its own.

const BLUE = "#0072B2", ORANGE = "#E69F00", VERMILION = "#D55E00", YELLOW = "#F0E442", GREY = "#8c8c8c";  // Okabe-Ito: colour-blind safe
const CIVIDIS = ["#00224e", "#002e6c", "#1e3a6f", "#35456c", "#47516c", "#575d6d", "#666970", "#757575",
                 "#848279", "#948e77", "#a59c74", "#b7a96e", "#c8b866", "#dbc75a", "#eed649", "#fee838"];
const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const WIDTH = 224, FPS = 3;  // of a picture in CSS pixels; of the player

// ── Elements ────────────────────────────────────────────────────────────────────────────────────────────────────────
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes))
    if (name.startsWith("on")) element[name] = value;
    else if (name === "style") element.style.cssText = value;  // a page's policy forbids style attributes
    else if (value !== undefined) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const bytes = base64 => Uint8Array.from(atob(base64), c => c.charCodeAt(0));
const short = x => String(+Number(x).toPrecision(3));
const percent = x => `${short(100 * x)} %`;

// ── Charts: numbers in, one small SVG out ───────────────────────────────────────────────────────────────────────────
const LEFT = 28, TOP = 14, BASE = 74;  // of the plotting area, in a drawing of 224 × 90
const text = (x, y, string, anchor = "middle", more = {}) => svg("text", { x, y, "text-anchor": anchor, ...more }, string);
const rect = (x, y, width, height, fill, more = {}) => svg("rect", { x, y, width, height, fill, ...more });
const picture = (label, height, ...shapes) => svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": label }, ...shapes);
const axes = (low, high) => [
  svg("path", { d: `M${LEFT} ${TOP}H${WIDTH}`, class: "vfm-hair" }),
  svg("path", { d: `M${LEFT} ${BASE}.5H${WIDTH}`, class: "vfm-axis" }),
  text(LEFT - 4, TOP + 4, high, "end"), text(LEFT - 4, BASE + 1, low, "end")];

function bars(chart, values, slot, unit) {  // one bar per temporal slot; the shown one is orange and says its number
  const max = chart.max || Math.max(...values) || 1, step = (WIDTH - LEFT) / values.length;
  const every = Math.ceil(values.length / 8), labelled = i => i === slot || (i % every === 0 && Math.abs(i - slot) >= every / 2);
  const strong = { class: "vfm-strong" }, y = value => BASE - (BASE - TOP) * Math.min(1, value / max), middle = i => LEFT + step * (i + 0.5);
  return picture(`${chart.title}: ${short(values[slot])} in ${unit} ${slot}, of at most ${short(max)}`, 90, ...axes("0", short(max)),
    ...values.map((value, i) => rect(LEFT + step * i + step * 0.12, y(value), step * 0.76, BASE - y(value), i === slot ? ORANGE : BLUE)),
    text(middle(slot), y(values[slot]) - 3, short(values[slot]), "middle", strong), text(LEFT - 4, 87, unit, "end"),
    ...values.map((_, i) => labelled(i) ? text(middle(i), 87, i, "middle", i === slot ? strong : {}) : ""));
}
function bins(chart) {  // groups of bars, one colour per series
  const series = Object.entries(chart.series), max = 1;
  const step = (WIDTH - LEFT) / chart.labels.length, width = step * 0.8 / series.length;
  const said = series.map(([name, values]) => `${name}: ${values.map((v, i) => `${chart.labels[i]} ${percent(v)}`).join(", ")}`);
  return picture(`${chart.title}. ${said.join(". ")}`, 90, ...axes("0", `${Math.round(100 * max)}%`),
    ...series.flatMap(([, values], k) => values.map((value, i) => {
      const height = (BASE - TOP) * value / max;
      return rect(LEFT + step * (i + 0.1) + width * k, BASE - height, width * 0.92, height, [BLUE, GREY][k]);
    })), ...chart.labels.map((label, i) => text(LEFT + step * (i + 0.5), 87, label)),
    ...(series.length < 2 ? [] : series).flatMap(([name], k) => [rect(LEFT + 84 + 58 * k, 1, 8, 8, [BLUE, GREY][k]), text(LEFT + 96 + 58 * k, 9, name, "start")]));
}
function share(chart) {  // one horizontal bar; its text stands beside the title
  return picture(`${chart.title}: ${chart.text}`, 12,
    rect(0.5, 0.5, WIDTH - 1, 11, "none", { class: "vfm-hair" }), rect(0, 0, WIDTH * Math.min(1, chart.value), 12, BLUE));
}
function cell(chart, slot, unit) {  // left: the 2×2 cell of the shown slot; right: the queue of four of every slot, which turns with time
  const color = skipped => skipped ? GREY : VERMILION, from = 84, step = (WIDTH - from) / chart.values.length, side = 15;
  const names = ["top left", "top right", "bottom left", "bottom right"].filter((_, i) => !chart.values[slot][i]);
  return picture(`${chart.title}: ${unit} ${slot} decodes ${names.join(", ")}`, 90,
    ...chart.values[slot].map((skipped, i) => rect(4 + 30 * (i % 2), TOP + 30 * (i >> 1), 29, 29, color(skipped))),
    ...chart.values.flatMap((queue, s) => queue.map((skipped, i) =>
      rect(from + step * s + 1, TOP + side * i, step - 2, side - 1, color(skipped)))),
    rect(from + step * slot, TOP - 1.5, step, 4 * side + 2, "none", { class: "vfm-frame" }),
    text(33, 87, "cell"), text(from - 4, 87, unit, "end"), text(from + step * (slot + 0.5), 87, slot, "middle", { class: "vfm-strong" }));
}
function choices(chart) {  // a bar per choice and a dot per measurement; what is chosen has a colour
  const step = (WIDTH - LEFT) / chart.labels.length, height = value => (BASE - TOP) * value / chart.max, means = chart.values.map(v => v.reduce((a, b) => a + b, 0) / v.length);
  return picture(`${chart.title}: ${chart.labels.map((label, i) => `${label} ${chart.values[i].map(short).join(", ")}`).join("; ")}`, 90, ...axes("0", short(chart.max)),
    ...means.flatMap((mean, i) => {
      const x = LEFT + step * (i + 0.5), fill = { a: BLUE, b: ORANGE }[chart.chosen[i]] ?? GREY, many = chart.values[i].length > 1, top = Math.max(...chart.values[i]);
      return [rect(x - step * 0.36, BASE - height(mean), step * 0.72, height(mean), fill),
        ...(many ? chart.values[i] : []).map((value, k, all) => svg("circle", { cx: x + step * 0.12 * (k - (all.length - 1) / 2), cy: BASE - height(value), r: 2.2, class: "vfm-dot" })),
        text(x, BASE - height(top) - 4, short(mean), "middle", { class: "vfm-strong" }), text(x, 87, chart.labels[i])];
    }));
}
const TONES = { blue: BLUE, orange: ORANGE, green: "#009E73", grey: GREY };
function flow(chart) {  // boxes and arrows; what is on is lit
  const point = ([x, y]) => `${x} ${y}`, on = thing => thing.on ? { class: "vfm-on" } : { opacity: 0.45 };
  return picture(chart.text, chart.height,
    ...chart.arrows.flatMap(arrow => {
      const tone = TONES[arrow.tone], [[x0, y0], [x, y]] = arrow.path.slice(-2), turn = Math.atan2(y - y0, x - x0) * 180 / Math.PI;
      return [svg("polyline", { points: arrow.path.map(point).join(" "), fill: "none", stroke: tone, "stroke-width": arrow.on ? 2 : 1.2, ...on(arrow) }),
        svg("path", { d: "M1 0L-6 -3.5V3.5Z", fill: tone, transform: `translate(${x} ${y}) rotate(${turn})`, ...on(arrow) })];
    }),
    ...chart.boxes.flatMap(({ at: [x, y, width, height], words, tone, on: lit }) => [
      rect(x, y, width, height, TONES[tone], { rx: 4, "fill-opacity": lit ? 0.3 : 0.06, stroke: TONES[tone], "stroke-width": lit ? 2 : 1 }),
      text(x + width / 2, y + height / 2 + 3.5, words, "middle", lit ? { class: "vfm-strong" } : {})]));
}
const CHARTS = { slots: (c, slot, unit) => bars(c, c.values, slot, unit), pairs: (c, slot, unit) => bars(c, c.values[slot], slot, unit), bins, share, cell, choices, flow };

function chart(c, slot, unit) {
  const caption = html("figcaption", {}, c.unit ? `${c.title} (${c.unit})` : c.title);
  if (c.kind === "share") caption.append(": ", html("b", {}, c.text));
  return html("figure", { "data-chart": c.kind }, caption, CHARTS[c.kind](c, slot, unit));
}

// ── Pictures: a frame, and per patch what became of it ──────────────────────────────────────────────────────────────
async function load(url) {  // a frame in colour and in grey, each on a canvas of its own size
  const image = new Image();
  image.src = url;
  await image.decode();
  const [color, grey] = [0, 1].map(() => html("canvas", { width: image.naturalWidth, height: image.naturalHeight }));
  color.getContext("2d").drawImage(image, 0, 0);
  const pixels = color.getContext("2d").getImageData(0, 0, color.width, color.height);
  for (let i = 0, p = pixels.data; i < p.length; i += 4) p.fill((p[i] + p[i + 1] + p[i + 2]) / 3, i, i + 3);
  grey.getContext("2d").putImageData(pixels, 0, 0);
  return { color, grey };
}
function hatching(g, line) {  // stripes for the patches whose loss counts
  const size = 5 * line, tile = html("canvas", { width: size, height: size }), pen = tile.getContext("2d");
  pen.strokeStyle = VERMILION;
  pen.lineWidth = 1.5 * line;
  for (const x of [-size, 0, size]) { pen.moveTo(x - size, 2 * size); pen.lineTo(x + 2 * size, -size); }
  pen.stroke();
  return g.createPattern(tile, "repeat");
}
function drawPanel(canvas, { color, grey }, [, h, w], slot, { digits, heat, overlay, marks }) {
  const g = canvas.getContext("2d"), { width: W, height: H } = canvas, zoom = color.width / W;
  const line = Math.max(1, Math.round(W / 160)), stripes = hatching(g, line);
  g.imageSmoothingEnabled = color.width > WIDTH / 2;  // small clips keep their square pixels
  g.drawImage(color, 0, 0, W, H);
  for (let i = 0; i < h * w; i++) {
    const [x, y, width, height] = box(i), token = slot * h * w + i, seen = !digits || digits[token] === "0";
    const tinted = heat && seen && (!digits || overlay === "heat"), faded = !seen && overlay !== "outline";
    if (tinted || faded) g.drawImage(grey, x * zoom, y * zoom, width * zoom, height * zoom, x, y, width, height);
    if (tinted) cover(i, CIVIDIS[parseInt(heat[token], 16)], 0.65);
    if (faded) cover(i, GREY, 0.8);
    if (!seen && digits[token] === "2") { cover(i, VERMILION, faded ? 0.2 : 0); cover(i, stripes, 0.9); }
    if (digits && seen && overlay === "outline") { outline(i, "#000", 3); outline(i, YELLOW, 1.5); }  // yellow shows on dark things, black on yellow ones
  }
  for (const { token, dash } of marks) {  // the query patch and the cursor, white on black so that they show on anything
    g.globalAlpha = Math.floor(token / (h * w)) === slot ? 1 : 0.6;  // pale in the other slots: same place, other time
    outline(token % (h * w), "#000", 3.5);
    g.setLineDash(dash ? [3 * line, 3 * line] : []);
    outline(token % (h * w), "#fff", 2);
    g.setLineDash([]);
  }
  g.globalAlpha = 1;

  function box(i) {  // left, top, width, height of patch i in whole pixels
    const [x, y] = [i % w, Math.floor(i / w)], left = Math.round(x * W / w), top = Math.round(y * H / h);
    return [left, top, Math.round((x + 1) * W / w) - left, Math.round((y + 1) * H / h) - top];
  }
  function cover(i, color, alpha) {
    g.globalAlpha = alpha;
    g.fillStyle = color;
    g.fillRect(...box(i));
    g.globalAlpha = 1;
  }
  function outline(i, color, thick) {
    const [x, y, width, height] = box(i), inset = 1.75 * line;
    g.strokeStyle = color;
    g.lineWidth = thick * line;
    g.strokeRect(x + inset, y + inset, width - 2 * inset, height - 2 * inset);
  }
}

// ── Controls: each kind makes its element and a function that follows the settings ──────────────────────────────────
const common = c => ({ "data-control": c.name, "aria-label": c.label, title: c.hint || undefined });
const labelled = (tag, c, ...children) => html(tag, { class: "vfm-control", title: c.hint || undefined }, html("span", {}, c.label), ...children);
const push = (c, onclick, label = c.label) => html("button", { ...common(c), type: "button", onclick, "aria-label": label }, c.label);
const range = (c, last, oninput) => html("input", { ...common(c), type: "range", min: 0, max: last, oninput });

function forgettable(c, empty, say, change) {  // what was chosen on the pictures, in words, with a button to forget it
  const state = html("output"), button = push(c, () => change(empty), `clear ${c.label}`);
  button.textContent = "clear";
  return { element: labelled("div", c, html("div", { class: "vfm-chosen" }, state, button)),
           follow(value) { state.textContent = say(value); button.hidden = String(value ?? "") === ""; } };
}
const CONTROLS = {
  choice(c, { change }) {
    const input = html("select", { ...common(c), onchange: () => change(c.options[input.selectedIndex]) },
      ...c.options.map(option => html("option", {}, String(option))));
    return { element: labelled("label", c, input), follow(value) { input.selectedIndex = c.options.indexOf(value); } };
  },
  slider(c, { change }) {
    const input = range(c, c.options.length - 1, () => change(c.options[+input.value])), element = labelled("label", c, input);
    const state = html("b");  // no <output>: the label would name it instead of the slider
    element.firstChild.append(state);
    return { element, follow(value) {
      input.value = c.options.reduce((best, o, i) => Math.abs(o - value) < Math.abs(c.options[best] - value) ? i : best, 0);
      input.setAttribute("aria-valuetext", state.textContent = short(value));
    } };
  },
  frame(c, { change, play, count }) {
    const input = range(c, count - 1, () => change(+input.value)), state = html("output");
    const button = html("button", { type: "button", "data-action": "play", onclick: play });
    return { element: html("div", { class: "vfm-player" }, button, html("label", {}, c.label, input), state), follow(value, playing) {
      input.value = value;
      state.textContent = `${value} / ${count - 1}`;
      button.textContent = playing ? "Pause" : "Play";
    } };
  },
  toggle(c, { change }) {
    const button = push(c, () => change(button.getAttribute("aria-pressed") !== "true"));
    return { element: html("div", { class: "vfm-control" }, button), follow(value) { button.setAttribute("aria-pressed", Boolean(value)); } };
  },
  action: (c, { send }) => ({ element: html("div", { class: "vfm-control" }, push(c, () => send({ action: c.name }))), follow() {} }),
  patch(c, { change, grid: [, h, w], unit }) {
    const place = i => `${unit} ${Math.floor(i / (h * w))} row ${Math.floor(i / w) % h} col ${i % w}`;
    return forgettable(c, null, value => value === null ? "none: click a picture" : place(value), change);
  },
  patches: (c, { change }) => forgettable(c, [], value => value.length ? `${value.length} kept` : "none: draw on a picture", change),
};

// ── The explorer ────────────────────────────────────────────────────────────────────────────────────────────────────
export function render({ model, el }) {
  const scene = model.get("scene"), [t, h, w] = scene.grid, count = scene.frames.length, unit = t === count ? "frame" : "slot";
  const settings = () => model.get("settings"), view = () => model.get("view") ?? {};  // a view may come later than its settings
  const shown = () => settings().frame ?? 0, slotShown = () => Math.floor(shown() * t / count);
  let timer = 0, waiting = 0;
  const pictures = new Map();                            // data URL -> the frame, once it is decoded
  let stroke = null;                                     // while drawing: do the patches we pass become kept (true) or hidden?
  const cursor = { row: 0, column: 0, visible: false };  // one cursor for all columns, so that places can be compared

  function change(name, value) {  // the only way out: the model tells our own listeners, and Python
    model.set("settings", { ...settings(), [name]: value });
    model.save_changes();
  }
  const step = by => change("frame", (shown() + by + count) % count);
  function play() {
    if (timer) timer = clearInterval(timer);
    else timer = setInterval(() => step(1), 1000 / FPS);
    follow();
  }

  // Pointing at patches
  const clip = (x, n) => Math.min(n - 1, Math.max(0, x)), pointed = () => (slotShown() * h + cursor.row) * w + cursor.column;
  const kept = () => new Set(settings().drawn ?? []), edits = part => Boolean(view()[part]?.edit);
  const answered = () => (scene.controls.find(c => c.name === "query")?.options ?? []).filter(Number.isInteger);
  function nearest(token) {  // a page may know only some patches: then the nearest is meant, of the same slot if there is one
    const known = answered();
    const axes = i => [Math.floor(i / (h * w)), Math.floor(i / w) % h, i % w], here = axes(token);
    const far = i => axes(i).reduce((sum, x, axis) => sum + (x - here[axis]) ** 2 * [1e6, 1, 1][axis], 0);
    return known.length ? known.reduce((best, i) => far(i) < far(best) ? i : best) : token;
  }
  function keep(token, wanted) {
    const tokens = kept();
    if (tokens.has(token) === wanted) return;
    if (wanted) tokens.add(token); else tokens.delete(token);
    change("drawn", [...tokens].sort((a, b) => a - b));
  }
  function click(part) {
    const token = nearest(pointed());
    if (edits(part)) keep(pointed(), !kept().has(pointed()));
    else if ("query" in settings()) change("query", token === settings().query ? null : token);
  }
  function move(row, column) {
    const from = { ...cursor };
    Object.assign(cursor, { row: clip(row, h), column: clip(column, w), visible: true });
    const steps = Math.max(Math.abs(cursor.row - from.row), Math.abs(cursor.column - from.column), 1);
    const along = (axis, i) => Math.round(from[axis] + (cursor[axis] - from[axis]) * i / steps);
    if (stroke !== null)  // a fast hand jumps over patches: draw the line between
      for (let i = 1; i <= steps; i++) keep((slotShown() * h + along("row", i)) * w + along("column", i), stroke);
    paint();
  }
  function point({ target, clientX, clientY }) {
    const { left, top, width, height } = target.getBoundingClientRect();
    move(Math.floor((clientY - top) / height * h), Math.floor((clientX - left) / width * w));
  }
  function column(part) {
    const width = WIDTH * Math.ceil(devicePixelRatio), see = visible => { cursor.visible = visible; paint(); };
    const canvas = html("canvas", { width, height: Math.round(width * scene.size[0] / scene.size[1]), tabindex: 0, role: "application",
      onpointerdown(event) {
        if (event.button || !edits(part)) return;
        point(event);
        canvas.setPointerCapture(event.pointerId);
        keep(pointed(), stroke = !kept().has(pointed()));
      },
      onpointermove: point, onpointerup() { stroke = null; }, onpointercancel() { stroke = null; },
      onclick(event) { if (!edits(part)) { point(event); click(part); } },
      onpointerleave() { see(false); }, onblur() { see(false); }, onfocus() { see(canvas.matches(":focus-visible")); },
    });
    const [title, legend, charts] = ["vfm-title", "vfm-legend", "vfm-charts"].map(name => html("div", { class: name }));
    return { element: html("section", { "data-part": part, hidden: "" }, title, canvas, legend, charts), title, canvas, legend, charts };
  }

  // The elements, made once
  const columns = Object.fromEntries(scene.parts.map(part => [part, column(part)]));
  const controls = scene.controls.map(c => ({ name: c.name, last: c.kind === "frame",
    ...CONTROLS[c.kind](c, { change: value => change(c.name, value), send: message => model.send(message), play, grid: scene.grid, count, unit }) }));
  const elements = last => controls.filter(c => c.last === last).map(c => c.element), words = html("p", { class: "vfm-words", role: "status" });
  el.classList.add("vfm-explorer");
  fill(el, { role: "group", "aria-label": scene.title, tabindex: -1 }, []);  // can have the focus, so that Space reaches it
  const some = answered().length && answered().length < t * h * w ? ` This page answers for ${answered().length} of ${t * h * w} patches; the nearest one is taken.` : "";
  el.replaceChildren(html("div", { class: "vfm-head" }, scene.title), html("div", { class: "vfm-controls" }, ...elements(false)), ...elements(true), words,
    html("div", { class: "vfm-columns" }, ...Object.values(columns).map(c => c.element)),
    html("p", { class: "vfm-help" }, `Keys: Space plays, comma and point step. On a picture, arrows move and Enter clicks.${some} ${scene.note ?? ""}`));

  function legend(panel, overlay) {
    const key = (digit, means) => html("span", { class: "vfm-key", "data-token": digit },
      html("i", digit ? {} : { style: `background-image:url(${scene.frames[shown()]})` }), means);
    const heat = () => html("span", { class: "vfm-heat" }, "least ", html("i", { style: `background:linear-gradient(90deg,${CIVIDIS})` }), " most");
    const keys = (panel.legend ?? []).map(([digit, means]) => key(digit, means));
    return panel.heat && (!panel.tokens || overlay === "heat") ? [...keys, heat()] : keys;
  }
  function drawColumn(column, panel, overlay, slot) {
    const mine = kept(), marks = Number.isInteger(panel.mark) ? [{ token: panel.mark }] : [];
    if (cursor.visible) marks.push({ token: pointed(), dash: true });
    // What the reader draws is known here before Python has answered.
    const digits = panel.edit && panel.tokens ? Array.from(panel.tokens, (d, i) => mine.has(i) ? "0" : d === "2" ? "2" : "1") : panel.tokens;
    drawPanel(column.canvas, picture(frameOf(panel)), scene.grid, slot, { digits, heat: panel.heat, overlay, marks });
    column.canvas.classList.toggle("vfm-edit", Boolean(panel.edit));
    const [, means] = panel.legend?.find(([digit]) => String(digit) === digits?.[pointed()]) ?? [];
    const label = `${panel.title}, frame ${shown()}, cursor at row ${cursor.row}, column ${cursor.column}`;
    column.canvas.setAttribute("aria-label", means ? `${label}: ${means}` : label);
    if (column.panel === panel && column.overlay === overlay && column.slot === slot) return;  // only the picture has changed
    Object.assign(column, { panel, overlay, slot });
    column.title.textContent = panel.title;
    column.legend.replaceChildren(...legend(panel, overlay));
    column.charts.replaceChildren(...(panel.charts ?? []).map(c => chart(c, slot, unit)));
  }
  function draw() {
    waiting = 0;
    const panels = view(), { overlay } = settings();
    if (Object.values(panels).filter(panel => !picture(frameOf(panel))).length) return;  // drawn when the last of them is decoded
    el.dataset.overlay = overlay ?? "";
    for (const [part, column] of Object.entries(columns)) {
      column.element.hidden = !panels[part];
      if (panels[part]) drawColumn(column, panels[part], panels[part].overlay ?? overlay, slotShown());
    }
    const said = scene.parts.map(part => panels[part]?.words ?? []).map(list => list[Math.floor(shown() * list.length / count)]).filter(Boolean);
    words.setAttribute("aria-live", timer ? "off" : "polite");  // nobody wants to hear three sentences per frame
    if (words.textContent !== said.join(" ")) words.replaceChildren(...said.flatMap(s => [html("span", {}, s), " "]).slice(0, -1));
    el.dataset.paints = Number(el.dataset.paints ?? 0) + 1;
  }
  function paint() { waiting ||= requestAnimationFrame(draw); }  // whatever happens, draw once per screen refresh
  const frameOf = panel => (panel.frames ?? scene.frames)[shown()];
  function picture(url) {
    if (pictures.size > 1000) pictures.clear();
    if (!pictures.has(url)) {
      pictures.set(url, null);
      load(url).then(frame => { pictures.set(url, frame); paint(); });
    }
    return pictures.get(url);
  }
  function follow() {
    for (const control of controls) control.follow(settings()[control.name], Boolean(timer));
    paint();
  }
  function receive({ download, mime, base64 }) {
    if (download) html("a", { download, href: URL.createObjectURL(new Blob([bytes(base64)], { type: mime })) }).click();
  }
  function onkey(event) {
    const on = selector => event.target.closest(selector), arrow = ARROWS[event.key];
    const picture = on("canvas");
    if (event.ctrlKey || event.metaKey || event.altKey || (event.shiftKey && event.key === "Enter")) return;
    event.stopPropagation();  // else JupyterLab takes them for its own: letters insert and delete cells, arrows leave the cell
    if (picture && arrow) move(cursor.row + arrow[0], cursor.column + arrow[1]);
    else if (picture && event.key === "Enter") click(on("section").dataset.part);
    else if (event.key === " " && !on("select, button")) play();
    else if ([",", "."].includes(event.key) && !on("select")) step(event.key === "." ? 1 : -1);
    else return;
    event.preventDefault();
  }

  const listeners = { "change:settings": follow, "change:view": paint, "msg:custom": receive };
  for (const [name, listener] of Object.entries(listeners)) model.on(name, listener);
  el.addEventListener("keydown", onkey);
  scene.frames.forEach(picture);
  follow();
  return () => {  // anywidget calls this when the output goes away
    clearInterval(timer);
    cancelAnimationFrame(waiting);
    el.removeEventListener("keydown", onkey);
    for (const [name, listener] of Object.entries(listeners)) model.off(name, listener);
  };
}

// ── Without a kernel: the same, with a model that looks its panels up in a table ────────────────────────────────────
export function page(el, scene) {
  const known = scene.controls.filter(c => c.kind !== "action"), listeners = {};
  const state = { scene: { ...scene, controls: known }, settings: Object.fromEntries(known.map(c => [c.name, c.value])) };
  const model = {
    get: name => state[name],
    set(name, value) { state[name] = value; (listeners[`change:${name}`] ?? []).forEach(listener => listener()); },
    on(name, listener) { (listeners[name] ??= []).push(listener); },
    off(name, listener) { listeners[name] = (listeners[name] ?? []).filter(l => l !== listener); },
    save_changes() {
      const rows = panels => typeof panels === "string" ? scene.table[panels].panels : panels;  // two parts may share one table
      const row = ({ by, panels }) => rows(panels)[by.map(name => String(state.settings[name] ?? "")).join("|")];
      model.set("view", Object.fromEntries(Object.entries(scene.table).map(([part, table]) => [part, row(table)])));
    },
  };
  model.save_changes();
  return render({ model, el });
}
export async function start(el) {  // a page carries its scene as base64 of deflated JSON
  const packed = bytes(el.querySelector("script[type='application/octet-stream']").textContent);
  const json = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
  return page(el, json);
}
export default { render };
