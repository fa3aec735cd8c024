// Looks at the service once a second and draws what it says. Texts are set as text, never as HTML:
// engines choose names.
const EVERY_MS = 1000;
const MOVE_MS = 2500; // how long a move is shown
const LIVE = 1, AWAITING = 2, KEPT = 3; // RegionState
const ROWS = 10, ROW_PX = 22;

const by = (id) => document.getElementById(id);
const number = (value) => Number(value).toLocaleString('en');
const share = (part, whole) => `${(100 * part / whole).toFixed(1)} %`;

let chosen = decodeURIComponent(location.hash.slice(1)); // the pool that is mapped
let before = null; // {at, counters by pool} of the look before
let places = new Map(); // start by handle, of the mapped pool
let moves = []; // {from, to, length, at}
let last = null;

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function meter(value, most, label) {
  return element('meter', undefined, { value, max: Math.max(most, 1), 'aria-label': label });
}

function fill(id, rows) {
  by(id).replaceChildren(...rows.map((cells) => {
    const row = element('tr');
    cells.forEach((cell, i) => {
      const made = element(i ? 'td' : 'th', undefined, i && !(cell instanceof Node) ? { class: 'number' } : {});
      made.append(cell);
      row.append(made);
    });
    return row;
  }));
}

async function look() {
  let told;
  try {
    const answer = await fetch(`api/look?pool=${encodeURIComponent(chosen)}`);
    told = await answer.json();
  } catch {
    told = { error: 'odma web does not answer any more' };
  }
  by('trouble').textContent = told.error ?? '';
  if (told.target) by('target').textContent = told.target;
  if (told.pools) show(told);
}

const isOpen = (pool) => pool.summary.state !== 'POOL_STATE_CLOSED';
const nameOf = (pool) => pool.summary.pool.name;

function rate(pool, ...fields) {
  const then = before?.counters.get(nameOf(pool));
  if (!then) return 0;
  const done = fields.reduce((sum, field) => sum + (pool.counters[field] - then[field]), 0);
  return Math.max(done, 0) / ((last.at - before.at) / 1000);
}

function show(told) {
  last = { ...told, at: performance.now() };
  const pools = told.pools;
  const busy = [...pools].sort((a, b) => isOpen(b) - isOpen(a)
    || rate(b, 'batches') - rate(a, 'batches') || b.summary.regions - a.summary.regions);
  by('none').hidden = pools.length > 0;
  by('pools').replaceChildren(...pools.map(card));
  const pool = pools.find((one) => nameOf(one) === chosen);
  by('pool').hidden = !pool;
  if (pool) {
    noteMoves(told.regions);
    showPool(pool, told.regions);
  } else if (busy.length) {
    choose(nameOf(busy[0]));
  }
  fill('events', told.events.slice(-15).reverse().map(({ unix_seconds, kind, pool: of, reason }) => [
    unix_seconds ? new Date(unix_seconds * 1000).toLocaleTimeString() : '',
    element('span', of?.name ?? ''),
    element('span', `${kind.replace('EVENT_KIND_', '').toLowerCase()} ${reason}`),
  ]));
  before = { at: last.at, counters: new Map(pools.map((one) => [nameOf(one), one.counters])) };
}

function card(pool) {
  const { summary } = pool;
  const made = element('button', undefined, { 'aria-pressed': nameOf(pool) === chosen });
  const state = summary.state.replace('POOL_STATE_', '').toLowerCase();
  made.append(
    element('b', nameOf(pool)),
    element('small', `${state}, ${summary.policy}, ${number(summary.regions)} regions, ${rate(pool, 'batches').toFixed(0)} batches/s`),
    meter(pool.used_tokens, summary.capacity_tokens, 'memory written'),
  );
  made.addEventListener('click', () => choose(nameOf(pool)));
  return made;
}

function choose(name) {
  chosen = name;
  history.replaceState(null, '', `#${encodeURIComponent(name)}`);
  places = new Map();
  moves = [];
  look();
}

function noteMoves(regions) {
  const now = new Map();
  for (const [start, length, , state, handle] of regions) {
    if (state !== LIVE) continue;
    const from = places.get(handle);
    if (from !== undefined && from !== start) moves.push({ from, to: start, length, at: last.at });
    now.set(handle, start);
  }
  places = now;
  moves = moves.filter(({ at }) => last.at - at < MOVE_MS);
}

function showPool(pool, regions) {
  const { summary, policy, counters } = pool;
  const capacity = summary.capacity_tokens;
  by('name').textContent = nameOf(pool);
  by('facts').textContent = `epoch ${summary.pool.epoch}, batch ${number(pool.last_seq)}, `
    + `${number(capacity)} tokens of ${number(pool.bytes_per_token)} bytes in blocks of ${pool.block_tokens}, `
    + `moves ${pool.moves.replace('MOVES_', '').toLowerCase()}`;
  draw(capacity, regions);
  const free = summary.free_tokens;
  fill('memory', [
    ['used', pool.used_tokens], ['reserved, unused', pool.reserved_tokens - pool.used_tokens],
    ['waits for completion', pool.awaiting_completion_tokens], ['free', free],
    ['longest free run', pool.largest_run_tokens], ['free in other runs', free - pool.largest_run_tokens],
    ['kept back for growth', pool.safety_tokens],
  ].map(([name, tokens]) => [name, number(tokens), share(tokens, capacity)]));
  fill('rates', [
    ['batches', ['batches']], ['regions given', ['allocates']], ['extends', ['extends']],
    ['refusals', ['refused_allocates', 'refused_extends']], ['preemptions', ['preempted']],
    ['tokens copied', ['copied_tokens']],
  ].map(([name, fields]) => [name, number(rate(pool, ...fields).toFixed(0))]));
  fill('counts', ['refused_allocates', 'refused_extends', 'preempted', 'relocations', 'compactions',
    'copies', 'safety_hits_growth', 'safety_hits_unsure', 'finished', 'hit_limit']
    .map((field) => [field.replaceAll('_', ' '), number(counters[field])]));
  fill('policy', [
    ['record', `${policy.name}, version ${policy.version}`], ['safety share', policy.safety_share],
    ['overflow risk', policy.overflow_risk], ['growth', policy.growth], ['step tokens', policy.step_tokens],
    ['model', pool.model_version || 'none'],
  ].map(([name, value]) => [name, String(value)]));
  const most = Math.max(...pool.buckets.map((bucket) => bucket.regions), 1);
  fill('buckets', pool.buckets.map(({ limit_tokens, regions: count }) =>
    [`to ${number(limit_tokens)}`, meter(count, most, 'regions'), number(count)]));
  const weights = binned(pool.output_histogram);
  const heaviest = Math.max(...weights.map(([, weight]) => weight), 1);
  fill('histogram', weights.map(([upper, weight]) =>
    [`to ${number(upper)}`, meter(weight, heaviest, 'answers'), weight.toFixed(0)]));
  fill('tenants', pool.tenants.map((tenant) => [
    tenant.name, meter(tenant.held_tokens, tenant.maximum_tokens, 'held of the maximum'),
    `${number(tenant.held_tokens)} of ${number(tenant.guaranteed_tokens)} to ${number(tenant.maximum_tokens)}`
      + (tenant.claimed_tokens ? `, waits for ${number(tenant.claimed_tokens)}` : ''),
  ]));
}

/** The bins of a histogram, put together by powers of two: [upper tokens, weight]. */
function binned(bins) {
  const sums = new Map();
  for (const { upper_tokens, finished, hit_limit } of bins) {
    const upper = 2 ** Math.ceil(Math.log2(upper_tokens));
    sums.set(upper, (sums.get(upper) ?? 0) + finished + hit_limit);
  }
  return [...sums].sort(([a], [b]) => a - b);
}

function draw(capacity, regions) {
  const canvas = by('map');
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = ROWS * ROW_PX;
  canvas.width = width * scale;
  canvas.height = height * scale;
  canvas.style.height = `${height}px`;
  const paper = canvas.getContext('2d');
  paper.scale(scale, scale);
  const style = getComputedStyle(document.documentElement);
  // A custom property is read as written; a probe has the colour that is in force.
  const colour = (name) => {
    canvas.style.color = style.getPropertyValue(`--${name}`);
    return getComputedStyle(canvas).color;
  };
  const inRow = capacity / ROWS;
  const box = (start, length, paint) => {
    for (let at = start; at < start + length;) {
      const row = Math.min(Math.floor(at / inRow), ROWS - 1);
      const end = Math.min(start + length, row === ROWS - 1 ? capacity : (row + 1) * inRow);
      paint(width * (at - row * inRow) / inRow, row * ROW_PX + 1, Math.max(width * (end - at) / inRow, 0.5), ROW_PX - 2);
      at = end;
    }
  };
  const solid = (name) => {
    const painted = colour(name);
    return (x, y, w, h) => { paper.fillStyle = painted; paper.fillRect(x, y, w, h); };
  };
  const paints = Object.fromEntries(['free', 'used', 'reserved', 'waiting', 'kept'].map((name) => [name, solid(name)]));
  box(0, capacity, paints.free);
  for (const [start, length, used, state] of regions) {
    if (state === AWAITING) box(start, length, paints.waiting);
    else if (state === KEPT) box(start, length, paints.kept);
    else {
      box(start, length, paints.reserved);
      box(start, used, paints.used);
    }
  }
  const moved = colour('moved');
  for (const { from, to, length, at } of moves) {
    paper.globalAlpha = 1 - (last.at - at) / MOVE_MS;
    paper.strokeStyle = moved;
    paper.setLineDash([3, 3]);
    box(from, length, (x, y, w, h) => paper.strokeRect(x, y, w, h));
    paper.setLineDash([]);
    paper.lineWidth = 2;
    box(to, length, (x, y, w, h) => paper.strokeRect(x, y, w, h));
    paper.lineWidth = 1;
  }
  paper.globalAlpha = 1;
  const live = regions.filter(([, , , state]) => state === LIVE).length;
  canvas.setAttribute('aria-label', `${live} live regions in ${number(capacity)} tokens, ${moves.length} moved just now`);
}

async function forever() {
  await look();
  setTimeout(forever, document.hidden ? 5 * EVERY_MS : EVERY_MS);
}
window.addEventListener('resize', () => {
  const pool = last?.pools.find((one) => nameOf(one) === chosen);
  if (pool) draw(pool.summary.capacity_tokens, last.regions);
});
forever();
