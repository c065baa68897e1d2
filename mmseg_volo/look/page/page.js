// Ids of labels live in byte arrays: nothing is ever read back from colours.
const $ = id => document.getElementById(id);
const ROW = 44;  // height of a picture in the list
const SIZES = [1, 3, 5, 9, 15, 25, 41, 81];
const REMEMBERED = 2 ** 28;  // bytes of the steps that can be undone
const canvas = $('canvas'), context = canvas.getContext('2d');
const sheet = document.createElement('canvas');  // the layer of colours over the picture
const state = {
  album: null, order: [], entries: [], ranked: 0, number: null, about: null, picture: null, detail: null,
  labels: null, before: null, truth: null, confidence: null, version: 'none',
  layer: 'labels', tool: 'move', paint: 0, size: 9, opacity: .55, hidden: new Set(),
  scale: 1, x: 0, y: 0, pointer: null, cross: null,
  undo: [], redo: [], bottom: 0, saved: 0, steps: 0,
};
window.look = state;

// The server

const address = new URLSearchParams(location.hash.slice(1));
if (address.has('token')) sessionStorage.setItem('token', address.get('token'));

async function ask(path, options = {}) {
  const headers = {...options.headers, 'X-Token': sessionStorage.getItem('token') ?? ''};
  const response = await fetch(`api/${path}`, {...options, headers}).catch(error => {
    throw error.name === 'AbortError' ? error : new Error('The server does not answer; perhaps the command has ended');
  });
  if (response.ok) return response;
  const {detail} = await response.json().catch(() => ({}));
  throw Object.assign(new Error(typeof detail === 'string' ? detail : `The server answers ${response.status}`), {status: response.status});
}
const bytes = async response => new Uint8Array(await response.arrayBuffer());
const pause = time => new Promise(resolve => setTimeout(resolve, time));

async function patiently(path, options) {
  for (;;) {
    try {
      return await ask(path, options);
    } catch (error) {
      if (error.status !== 503) throw error;
      await pause(1000);
      options.signal.throwIfAborted();
    }
  }
}

// Messages

let fading;
function say(text, bad = false) {
  clearTimeout(fading);
  $('message').textContent = text;
  $('message').className = bad ? 'bad' : '';
  $('message').hidden = !text;
  if (!bad) fading = setTimeout(() => { $('message').hidden = true; }, 4000);
}

function choose(question, ...answers) {
  $('question').textContent = question;
  $('dialog').querySelector('form').replaceChildren(...answers.map((answer, i) => {
    const button = Object.assign(document.createElement('button'), {value: answer, textContent: answer});
    if (i === 0) button.className = 'main';
    return button;
  }));
  $('dialog').returnValue = '';
  $('dialog').showModal();
  return new Promise(resolve => $('dialog').addEventListener('close', () => resolve($('dialog').returnValue), {once: true}));
}

// Opening a picture

let loading = new AbortController(), opened = 0;

async function open(number) {
  endStroke();
  if (number === undefined || !(await mayLeave())) return;
  loading.abort();
  loading = new AbortController();
  const {signal} = loading, hurry = performance.now() - opened < 300;
  opened = performance.now();
  Object.assign(state, {number, about: null, picture: null, detail: null, labels: null, before: null, truth: null, confidence: null,
                        version: 'none', undo: [], redo: [], bottom: 0, saved: 0, steps: 0, cross: null, pointer: null});
  history.replaceState(null, '', `#picture=${number}`);
  $('problem').hidden = true;
  $('busy').hidden = false;
  say('');
  showPlace();
  showList(true);
  showState();
  try {
    if (hurry) await pause(200);  // an arrow key that is held down
    signal.throwIfAborted();
    const about = await (await patiently(`pictures/${number}`, {signal})).json();
    const plane = async name => bytes(await patiently(`pictures/${number}/${name}`, {signal}));
    const view = async () => createImageBitmap(await (await ask(`pictures/${number}/view`, {signal})).blob());
    const missing = error => { if (!signal.aborted) say(error.message, true); return null; };
    const saved = about.saved ? ask(`pictures/${number}/saved`, {signal}).catch(missing) : null;
    const truth = about.truth ? plane('truth').catch(missing) : null;
    const [picture, labels, confidence] = await Promise.all([view(), saved ? null : plane('labels'), plane('confidence')]);
    const corrected = await saved;
    Object.assign(state, {
      about, picture, confidence, truth: await truth, version: corrected?.headers.get('x-version') ?? 'none',
      labels: corrected ? await bytes(corrected) : labels ?? await plane('labels'),
    });
    signal.throwIfAborted();
    state.before = state.labels.slice();
    if (!state.truth && ['truth', 'errors'].includes(state.layer)) state.layer = 'labels';
    fit();
  } catch (error) {
    if (signal.aborted) return;
    $('problem').textContent = error.message;
    $('problem').hidden = false;
  }
  $('busy').hidden = true;
  showState();
  summarize();
}

const isDropped = () => state.number >= state.entries.length;
const step = by => open(state.order[Math.max(0, state.order.indexOf(state.number) + by)]);

async function mayLeave() {
  if (!isDirty()) return true;
  const answer = await choose('The labels of this picture have changes that are not saved.', 'Save', 'Discard the changes', 'Stay here');
  return answer === 'Save' ? save() : answer === 'Discard the changes';
}

async function drop(file) {
  endStroke();
  if (!file || !(await mayLeave())) return;
  if (file.size > state.album.mostBytes) return say(`${file.name} has more than ${state.album.mostBytes} bytes`, true);
  state.saved = top();
  try {
    const headers = {'X-Name': encodeURIComponent(file.name)};
    await open((await (await ask('pictures', {method: 'POST', body: file, headers})).json()).number);
  } catch (error) {
    say(error.message, true);
  }
}

// Editing

const top = () => state.undo.at(-1)?.id ?? state.bottom;
const isDirty = () => state.labels !== null && top() !== state.saved;
const canPaint = () => state.labels !== null && !isDropped() && state.tool !== 'move';
let box = null;  // left, top, right and bottom of what has changed since the last step

function mark(left, right, y) {
  box = box ? [Math.min(box[0], left), Math.min(box[1], y), Math.max(box[2], right), Math.max(box[3], y)] : [left, y, right, y];
}

function stamp(x, y) {
  const {width, height} = state.about, reach = (state.size - 1) / 2;
  for (let dy = -reach; dy <= reach; dy++) {
    const row = y + dy, half = Math.floor(Math.sqrt(state.size ** 2 / 4 - dy * dy));
    const left = Math.max(0, x - half), right = Math.min(width - 1, x + half);
    if (row < 0 || row >= height || left > right) continue;
    state.labels.fill(state.paint, row * width + left, row * width + right + 1);
    mark(left, right, row);
  }
}

function line([fromX, fromY], [toX, toY]) {
  const steps = Math.max(Math.abs(toX - fromX), Math.abs(toY - fromY), 1);
  for (let i = 1; i <= steps; i++) stamp(Math.round(fromX + (toX - fromX) * i / steps), Math.round(fromY + (toY - fromY) * i / steps));
}

function fill(x, y) {
  const {width, height} = state.about, {labels, paint} = state, old = labels[y * width + x];
  const waiting = old === paint ? [] : [[x, y]];
  while (waiting.length) {
    const [x, y] = waiting.pop(), start = y * width;
    if (labels[start + x] !== old) continue;
    let left = x, right = x;
    while (left > 0 && labels[start + left - 1] === old) left--;
    while (right < width - 1 && labels[start + right + 1] === old) right++;
    labels.fill(paint, start + left, start + right + 1);
    mark(left, right, y);
    for (const row of [y - 1, y + 1]) {
      if (row < 0 || row >= height) continue;
      for (let i = left; i <= right; i++) {
        if (labels[row * width + i] === old && (i === left || labels[row * width + i - 1] !== old)) waiting.push([i, row]);
      }
    }
  }
}

function copied(from, [left, top, right, bottom]) {
  const {width} = state.about, wide = right - left + 1, data = new Uint8Array(wide * (bottom - top + 1));
  for (let y = top; y <= bottom; y++) data.set(from.subarray(y * width + left, y * width + right + 1), (y - top) * wide);
  return data;
}

function paste(data, [left, top, right, bottom]) {
  const wide = right - left + 1;
  for (let y = top; y <= bottom; y++) {
    const row = data.subarray((y - top) * wide, (y - top + 1) * wide), at = y * state.about.width + left;
    state.labels.set(row, at);
    state.before.set(row, at);
  }
}

function commit() {
  if (!box) return;
  const old = copied(state.before, box), now = copied(state.labels, box);
  if (old.some((id, i) => id !== now[i])) {
    state.undo.push({id: ++state.steps, box, data: old});
    state.redo = [];
    let size = state.undo.reduce((sum, step) => sum + step.data.length, 0);
    while (size > REMEMBERED && state.undo.length > 1) {
      const oldest = state.undo.shift();
      size -= oldest.data.length;
      state.bottom = oldest.id;
    }
    paste(now, box);
  }
  box = null;
  showState();
  summarize();
}

function swap(from, to) {
  endStroke();
  const step = from.pop();
  if (!step) return;
  to.push({...step, data: copied(state.labels, step.box)});
  paste(step.data, step.box);
  showState();
  summarize();
}
const undo = () => swap(state.undo, state.redo), redo = () => swap(state.redo, state.undo);

async function restart(name) {
  const {number} = state;
  try {
    const ids = name === 'truth' ? state.truth : await bytes(await patiently(`pictures/${number}/labels`, {signal: loading.signal}));
    if (number !== state.number) return;
    endStroke();
    state.labels.set(ids);
    box = [0, 0, state.about.width - 1, state.about.height - 1];
    commit();
  } catch (error) {
    if (error.name !== 'AbortError') say(error.message, true);
  }
}

let saving = Promise.resolve();  // one at a time, or a second Ctrl+S would mistake the first for another tab

function save() {
  const {number} = state;
  endStroke();
  saving = saving.then(() => number === state.number && put(state.version));
  return saving;
}

async function put(version) {
  if (!state.labels || isDropped()) return false;
  const {number} = state, step = top();
  try {
    const response = await ask(`pictures/${number}/saved`, {method: 'PUT', body: state.labels, headers: {'X-Version': version}});
    const {version: written, file} = await response.json();
    state.entries[number].saved = true;
    if (number === state.number) Object.assign(state, {saved: step, version: written});
    say(`Saved as ${file}`);
  } catch (error) {
    if (error.status === 412) {
      const answer = await choose('These labels were also saved elsewhere, perhaps in another tab, since this page loaded them.',
        'Replace them by mine', 'Load the other ones', 'Decide later');
      if (answer === 'Replace them by mine') return put('*');
      if (answer === 'Load the other ones') { state.saved = top(); await open(number); }
      return false;
    }
    say(`${error.message}. The changes are still here.`, true);
    return false;
  } finally {
    showState();
    showList();
  }
  return true;
}

// Drawing

const colour = ([r, g, b], alpha) => (Math.round(alpha * 255) << 24 | b << 16 | g << 8 | r) >>> 0;  // of a little-endian pixel
let waiting = false;

function draw() {
  if (!waiting) requestAnimationFrame(() => { waiting = false; paintScreen(); });
  waiting = true;
}

function tables() {
  const {palette} = state.album, clear = new Uint32Array(256);
  const ids = clear.map((_, id) => state.hidden.has(id) ? 0 : colour(palette[id] ?? [0, 0, 0], state.opacity));
  const unsure = clear.map((_, sure) => colour([255, 70 + sure / 2, 20], state.opacity * (1 - sure / 255) ** .7));
  return {ids, unsure, wrong: colour([255, 40, 40], state.opacity), unknown: colour([0, 0, 0], state.opacity)};
}

function paintScreen() {
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (!state.picture || !state.labels) return;
  const {scale, x, y, about: {width, height}, labels, truth, confidence, layer} = state;
  context.imageSmoothingEnabled = scale < 2;
  context.drawImage(state.picture, x, y, width * scale, height * scale);
  if (state.detail) {
    const {picture, left, top, wide, high} = state.detail;
    context.drawImage(picture, x + left * scale, y + top * scale, wide * scale, high * scale);
  }
  const first = Math.max(0, Math.ceil(x - .5)), last = Math.min(canvas.width, Math.ceil(x + width * scale - .5));
  const upper = Math.max(0, Math.ceil(y - .5)), lower = Math.min(canvas.height, Math.ceil(y + height * scale - .5));
  if (last <= first || lower <= upper) return;
  const pixels = new ImageData(last - first, lower - upper), out = new Uint32Array(pixels.data.buffer);
  const at = (i, offset, length) => Math.min(length - 1, Math.max(0, Math.floor((i + .5 - offset) / scale)));
  const columns = Uint32Array.from({length: last - first}, (_, i) => at(first + i, x, width));
  const {ids, unsure, wrong, unknown} = tables(), {void: none} = state.album;
  const source = {labels, truth, confidence}[layer], table = layer === 'confidence' ? unsure : ids;
  for (let j = 0, k = 0; j < lower - upper; j++) {
    const start = at(upper + j, y, height) * width;
    for (const column of columns) {
      const i = start + column;
      out[k++] = source ? table[source[i]] : truth[i] === none ? unknown : truth[i] === labels[i] || !ids[labels[i]] ? 0 : wrong;
    }
  }
  sheet.width = pixels.width;
  sheet.height = pixels.height;
  sheet.getContext('2d').putImageData(pixels, 0, 0);
  context.drawImage(sheet, first, upper);
  const mark = state.cross ?? state.pointer;
  if (mark && (state.cross || canPaint())) ring(mark);
  sharpen();
}

function ring([px, py]) {
  const {scale} = state, x = state.x + (px + .5) * scale, y = state.y + (py + .5) * scale;
  const radius = Math.max(3, state.tool === 'brush' ? state.size / 2 * scale : 6);
  for (const [style, width] of [['#000', 3], ['#fff', 1.5]]) {
    context.strokeStyle = style;
    context.lineWidth = width;
    context.beginPath();
    context.arc(x, y, radius, 0, 7);
    context.stroke();
  }
}

let sharpening;
function sharpen() {
  clearTimeout(sharpening);
  const {about: {width, height}, picture, scale, x, y, number} = state;
  if (picture.width >= width || scale <= picture.width / width) return;
  const left = Math.max(0, Math.floor(-x / scale)), top = Math.max(0, Math.floor(-y / scale));
  const wide = Math.min(width - left, Math.ceil(canvas.width / scale) + 1), high = Math.min(height - top, Math.ceil(canvas.height / scale) + 1);
  const known = state.detail;
  if (wide < 1 || high < 1 || (known && known.left === left && known.top === top && known.wide === wide && known.high === high)) return;
  sharpening = setTimeout(async () => {
    const response = await ask(`pictures/${number}/view?left=${left}&top=${top}&width=${wide}&height=${high}`, {signal: loading.signal});
    const detail = {picture: await createImageBitmap(await response.blob()), left, top, wide, high};
    if (number === state.number) { state.detail = detail; draw(); }
  }, 250);
}

function zoom(factor, x = canvas.width / 2, y = canvas.height / 2) {
  if (!state.about) return;
  const scale = Math.min(64, Math.max(fitting() / 4, state.scale * factor));
  state.x = x - (x - state.x) * scale / state.scale;
  state.y = y - (y - state.y) * scale / state.scale;
  state.scale = scale;
  draw();
}
const fitting = () => Math.min(canvas.width / state.about.width, canvas.height / state.about.height, 32);

function fit(scale = state.about && fitting()) {
  if (!state.about) return;
  const {width, height} = state.about;
  Object.assign(state, {scale, x: Math.round((canvas.width - width * scale) / 2), y: Math.round((canvas.height - height * scale) / 2)});
  draw();
}

// What is shown beside the picture

function showPlace() {
  const place = state.order.indexOf(state.number);
  $('name').textContent = isDropped() ? 'a dropped picture' : state.entries[state.number]?.name ?? 'No picture';
  $('place').textContent = place < 0 ? '' : `${place + 1} of ${state.order.length}`;
  $('previous').disabled = place === 0;
  $('next').disabled = place === state.order.length - 1;
}

function showState() {
  const ready = state.labels !== null;
  if (isDropped() && state.about) $('name').textContent = state.about.name;
  for (const button of document.querySelectorAll('[data-tool], [data-layer]')) {
    const {tool, layer} = button.dataset;
    button.ariaPressed = String(tool === state.tool || layer === state.layer);
    button.disabled = ready && (tool ? isDropped() && tool !== 'move' : !state.truth && ['truth', 'errors'].includes(layer));
  }
  canvas.className = state.tool;
  $('undo').disabled = !state.undo.length;
  $('redo').disabled = !state.redo.length;
  $('save').disabled = !ready || isDropped();
  $('restart').disabled = !ready || isDropped();
  $('restart').querySelector('[value=truth]').disabled = !state.truth;
  $('size-shown').textContent = `${state.size} px`;
  $('opacity-shown').textContent = `${Math.round(state.opacity * 100)} %`;
  document.title = `${isDirty() ? '• ' : ''}${$('name').textContent} – look`;
  $('save').textContent = isDirty() ? 'Save changes' : 'Save labels';
  for (const row of $('legend').children) {
    row.querySelector('button').ariaPressed = String(Number(row.dataset.id) === state.paint);
    row.querySelector('input').checked = !state.hidden.has(Number(row.dataset.id));
  }
  $('all').textContent = state.hidden.size ? 'Show all' : 'Hide all';
  draw();
}

let counting;
function summarize() {
  clearTimeout(counting);
  counting = setTimeout(() => {
    const {labels, truth, album} = state, counts = new Float64Array(256);
    let known = 0, wrong = 0;
    if (labels) for (let i = 0; i < labels.length; i++) {
      counts[labels[i]]++;
      if (truth && truth[i] !== album.void) { known++; if (truth[i] !== labels[i]) wrong++; }
    }
    for (const row of $('legend').children) {
      const share = labels ? counts[row.dataset.id] / labels.length : 0;
      row.querySelector('span').textContent = share === 0 ? '' : share < .001 ? '< 0.1 %' : `${(share * 100).toFixed(1)} %`;
    }
    $('agreement').textContent = known ? `${(wrong / known * 100).toFixed(1)} % of ${known.toLocaleString('en')} true labels differ.` : '';
  }, 60);
}

function readout([x, y] = []) {
  const {about, labels, truth, confidence, album} = state;
  if (!labels || x === undefined) return '';
  const i = y * about.width + x, name = id => album.classes[id] ?? 'void';
  const told = truth ? `\ntruth: ${name(truth[i])}` : '';
  return `${name(labels[i])} at ${x}, ${y}\nconfidence ${Math.round(confidence[i] / 2.55)} %${told}`;
}

function makeLegend() {
  const {classes, palette, void: none} = state.album;
  $('legend').replaceChildren(...[...classes.keys(), none].map(id => {
    const row = document.createElement('li'), name = classes[id] ?? 'void';
    row.dataset.id = id;
    row.innerHTML = '<input type="checkbox"><button><i></i><b></b></button><span></span>';
    row.querySelector('input').ariaLabel = `Show ${name}`;
    row.querySelector('input').addEventListener('change', event => {
      state.hidden[event.target.checked ? 'delete' : 'add'](id);
      showState();
    });
    row.querySelector('b').textContent = name;
    row.querySelector('button').ariaLabel = `Paint ${name}`;
    row.querySelector('button').addEventListener('click', () => { state.paint = id; showState(); });
    row.querySelector('i').style.background = `rgb(${palette[id] ?? [0, 0, 0]})`;
    return row;
  }));
}

// The list of pictures: only the rows in sight exist, so ten thousand cost no more than twenty

function sortPictures() {
  const rank = i => state.entries[i].problem ? 3 : state.entries[i].confidence ?? 2;
  state.order = [...state.entries.keys()];
  if ($('sort').value === 'confidence') state.order.sort((a, b) => rank(a) - rank(b) || a - b);
  showPlace();
}

function showList(follow = false) {
  const list = $('list'), rows = list.firstElementChild, place = state.order.indexOf(state.number);
  rows.style.height = `${state.order.length * ROW}px`;
  if (follow && place >= 0) {
    list.scrollTop = Math.min(place * ROW, Math.max(list.scrollTop, (place + 1) * ROW - list.clientHeight));
  }
  const first = Math.floor(list.scrollTop / ROW), last = Math.ceil((list.scrollTop + list.clientHeight) / ROW);
  rows.replaceChildren(...state.order.slice(first, last).map((number, i) => listRow(number, first + i)));
  list.setAttribute('aria-activedescendant', rows.querySelector('[aria-selected=true]')?.id ?? '');
}

let hidden = 0;  // characters at the end that all names share, such as a suffix
function sharedEnd(names) {
  let length = 0;
  while (names.length > 1 && names.every(name => length < name.length && name.at(-1 - length) === names[0].at(-1 - length))) length++;
  return names[0].slice(names[0].length - length).match(/[^a-z0-9].*$/i)?.[0].length ?? 0;
}

function listRow(number, place) {
  const {name, confidence, problem, saved} = state.entries[number], row = document.createElement('div');
  row.innerHTML = '<span><bdi></bdi></span><b></b><small></small>';
  Object.assign(row, {id: `picture-${number}`, role: 'option', ariaSelected: String(number === state.number),
                      ariaPosInSet: String(place + 1), ariaSetSize: String(state.order.length), title: problem ?? name});
  row.style.top = `${place * ROW}px`;
  const [title, sure, note] = row.children;
  title.firstChild.textContent = name.slice(0, name.length - hidden);
  sure.textContent = problem ? '⚠' : confidence === null ? '' : `${Math.round(confidence * 100)} %`;
  note.textContent = problem ?? (saved ? '✓ saved' : confidence === null ? 'not ranked yet' : '');
  note.className = problem ? 'bad' : '';
  return row;
}

async function follow() {
  while (state.ranked < state.entries.length) {
    const news = await (await ask(`ranked?since=${state.ranked}`)).json();
    for (const [number, confidence, problem] of news) Object.assign(state.entries[number], {confidence, problem});
    state.ranked += news.length;
    if (news.length) { sortPictures(); showList(); }
    $('progress').hidden = state.ranked === state.entries.length;
    Object.assign($('progress').querySelector('progress'), {max: state.entries.length, value: state.ranked});
    $('progress').querySelector('span').textContent = `${state.ranked} of ${state.entries.length} ranked`;
    await pause(1000);
  }
}

// Pointer and keys

const POINT = 'Point at a pixel to see its class';
const pointers = new Map();  // places of the fingers or the mouse button that are down
let drawing = false;
const place = event => [event.offsetX * canvas.width / canvas.clientWidth, event.offsetY * canvas.height / canvas.clientHeight];

function pixel([x, y]) {
  return [Math.floor((x - state.x) / state.scale), Math.floor((y - state.y) / state.scale)];
}
const inside = ([x, y]) => x >= 0 && y >= 0 && x < state.about.width && y < state.about.height;

function use([x, y]) {
  if (!canPaint() || !inside([x, y])) return;
  state.tool === 'fill' ? fill(x, y) : stamp(x, y);
}

canvas.addEventListener('pointerdown', event => {
  if (!state.labels || event.button > 1) return;
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, place(event));
  if (pointers.size > 1 && box) paste(copied(state.before, box), box);  // two fingers zoom: the first one meant no stroke
  if (pointers.size > 1) box = null;
  drawing = pointers.size === 1 && event.button === 0 && canPaint();
  state.cross = null;
  if (drawing) use(pixel(place(event)));
  if (drawing && state.tool === 'fill') { endStroke(); pointers.clear(); }
  draw();
});

canvas.addEventListener('pointermove', event => {
  if (!state.labels) return;
  const now = place(event), before = pointers.get(event.pointerId);
  const over = pixel(now);
  state.pointer = inside(over) ? over : null;
  if (state.pointer) $('readout').textContent = readout(over);
  if (before && drawing) {
    let from = pixel(before);
    for (const part of event.getCoalescedEvents?.() ?? [event]) {
      const to = pixel(place(part));
      if (to[0] !== from[0] || to[1] !== from[1]) line(from, to);
      from = to;
    }
  } else if (before) {
    const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
    state.x += (now[0] - before[0]) / (other ? 2 : 1);
    state.y += (now[1] - before[1]) / (other ? 2 : 1);
    if (other) zoom(Math.hypot(now[0] - other[0], now[1] - other[1]) / Math.hypot(before[0] - other[0], before[1] - other[1]),
      (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
  }
  if (before) pointers.set(event.pointerId, now);
  draw();
});

function endStroke() {
  if (drawing) commit();
  drawing = false;
}

for (const kind of ['pointerup', 'pointercancel']) canvas.addEventListener(kind, event => {
  pointers.delete(event.pointerId);
  endStroke();
});
canvas.addEventListener('pointerleave', () => { state.pointer = null; $('readout').textContent = POINT; draw(); });
canvas.addEventListener('wheel', event => {
  event.preventDefault();
  if (state.labels) zoom(1.0015 ** -event.deltaY, ...place(event));
}, {passive: false});

function moveCross(dx, dy) {
  const {width, height} = state.about, [x, y] = state.cross ?? state.pointer ?? [width >> 1, height >> 1];
  state.cross = [Math.min(width - 1, Math.max(0, x + dx)), Math.min(height - 1, Math.max(0, y + dy))];
  $('readout').textContent = readout(state.cross);
  say(readout(state.cross));
  draw();
}

const press = (kind, name) => { document.querySelector(`[data-${kind}=${name}]`).click(); };
const resize = by => {
  $('size').value = Number($('size').value) + by;
  $('size').dispatchEvent(new Event('input'));
};
const OWN_ARROWS = 'select, input[type=range], [role=listbox]';
const KEYS = {
  ArrowLeft: () => step(-1), ArrowRight: () => step(1),
  v: () => press('tool', 'move'), b: () => press('tool', 'brush'), f: () => press('tool', 'fill'),
  l: () => press('layer', 'labels'), t: () => press('layer', 'truth'), e: () => press('layer', 'errors'), c: () => press('layer', 'confidence'),
  '[': () => resize(-1), ']': () => resize(1), '+': () => $('larger').click(), '-': () => $('smaller').click(),
  0: () => fit(), 1: () => fit(1), '?': () => $('keys').showModal(),
  p: () => {
    const at = state.cross ?? state.pointer;
    if (at && state.labels) { state.paint = state.labels[at[1] * state.about.width + at[0]]; showState(); }
  },
};

addEventListener('keydown', event => {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key, command = event.ctrlKey || event.metaKey;
  if (document.querySelector('dialog[open]')) return;
  if (command && 'zys'.includes(key)) {
    event.preventDefault();
    ({z: event.shiftKey ? redo : undo, y: redo, s: () => save()})[key]();
  } else if (event.target === canvas && event.shiftKey && key.startsWith('Arrow') && state.labels) {
    event.preventDefault();
    moveCross((key === 'ArrowRight') - (key === 'ArrowLeft'), (key === 'ArrowDown') - (key === 'ArrowUp'));
  } else if (event.target === canvas && key === 'Enter' && state.cross) {
    use(state.cross);
    commit();
  } else if (!command && !event.altKey && Object.hasOwn(KEYS, key) && !event.target.matches(key.startsWith('Arrow') ? OWN_ARROWS : 'select')) {
    event.preventDefault();
    KEYS[key]();
  }
});

// Everything else that can be pressed, moved or dropped

for (const kind of ['tool', 'layer']) {
  for (const button of document.querySelectorAll(`[data-${kind}]`)) {
    button.addEventListener('click', () => { state[kind] = button.dataset[kind]; showState(); });
  }
}
const clicks = {previous: () => step(-1), next: () => step(1), undo, redo, save: () => save(), help: () => $('keys').showModal(),
                larger: () => zoom(1.5), smaller: () => zoom(1 / 1.5), actual: () => fit(1), fit: () => fit(), open: () => $('file').click(),
                all: () => { state.hidden = new Set(state.hidden.size ? [] : [...state.album.classes.keys(), state.album.void]); showState(); }};
for (const [id, act] of Object.entries(clicks)) $(id).addEventListener('click', () => act());
$('opacity').addEventListener('input', event => { state.opacity = event.target.value / 100; showState(); });
$('size').addEventListener('input', event => { state.size = SIZES[event.target.value]; showState(); });
$('restart').addEventListener('change', event => { restart(event.target.value); event.target.value = ''; });
$('sort').addEventListener('change', () => { sortPictures(); showList(true); });
$('file').addEventListener('change', event => { drop(event.target.files[0]); event.target.value = ''; });
for (const range of [$('opacity'), $('size')]) range.addEventListener('pointerup', () => canvas.focus());  // gives arrow keys back

$('list').addEventListener('scroll', () => showList());
$('list').addEventListener('click', event => {
  const row = event.target.closest('[role=option]');
  if (row) open(Number(row.id.slice('picture-'.length)));
});
$('list').addEventListener('keydown', event => {
  const place = state.order.indexOf(state.number), last = state.order.length - 1;
  const to = {ArrowUp: place - 1, ArrowDown: place + 1, ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: last,
              PageUp: place - 10, PageDown: place + 10}[event.key];
  if (to === undefined) return;
  event.preventDefault();
  open(state.order[Math.max(0, Math.min(last, to))]);
});

for (const kind of ['dragover', 'dragleave', 'drop']) addEventListener(kind, event => {
  event.preventDefault();
  document.body.classList.toggle('dropping', kind === 'dragover');
  if (kind === 'drop') drop(event.dataTransfer.files[0]);
});
addEventListener('beforeunload', event => { if (isDirty()) event.preventDefault(); });
addEventListener('hashchange', () => { if (location.hash.includes('token=')) location.reload(); });
new ResizeObserver(() => {
  const untouched = state.about && state.scale === fitting();
  canvas.width = Math.round(canvas.clientWidth * devicePixelRatio);
  canvas.height = Math.round(canvas.clientHeight * devicePixelRatio);
  untouched ? fit() : draw();
  showList();
}).observe(canvas);

try {
  state.album = await (await ask('album')).json();
  state.entries = state.album.pictures.map(([name, saved]) => ({name, saved, confidence: null, problem: null}));
  $('title').textContent = state.album.title;
  $('readout').textContent = POINT;
  hidden = sharedEnd(state.entries.map(entry => entry.name));
  makeLegend();
  sortPictures();
  follow().catch(error => say(error.message, true));
  const wanted = Number(address.get('picture') ?? -1);
  await open(state.order.includes(wanted) ? wanted : state.order[0]);
} catch (error) {
  for (const control of document.querySelectorAll('button, select, input')) control.disabled = true;
  $('problem').textContent = error.message;
  $('problem').hidden = false;
}
