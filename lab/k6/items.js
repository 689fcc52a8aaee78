// What the scripts share: items to work on, the mix of operations, what is measured and checked.

import http from 'k6/http';
import { check } from 'k6';
import { Counter, Rate, Trend } from 'k6/metrics';

export const BASE_URL = __ENV.BASE_URL || 'http://localhost:8000';
const JSON_BODY = { 'Content-Type': 'application/json' };

// Time until the answer's first byte, by what the read met; `true`: values are milliseconds.
export const hitDuration = new Trend('hit_duration', true);
export const missDuration = new Trend('miss_duration', true);
export const bypassDuration = new Trend('bypass_duration', true);
export const readDuration = new Trend('read_duration', true);
export const writeDuration = new Trend('write_duration', true);
export const hitRatio = new Rate('hit_ratio');
// Reads that returned an older version than one that was acknowledged, or read, before they began.
export const staleReads = new Counter('stale_reads');
export const readErrors = new Rate('read_errors');
export const writeErrors = new Rate('write_errors');

// A number of its own for each run, so that names are unique.
const RUN = Date.now().toString(36);

function body(name) {
  return JSON.stringify({ name: `${name} ${RUN}`, price: Math.floor(Math.random() * 10000) / 100 });
}

function params(name, base) {
  return { headers: JSON_BODY, tags: { name, target: base } };
}

// Creates the items of a run; call it in `setup` and pass the ids on.
export function createItems(count, base = BASE_URL) {
  const ids = [];
  for (let i = 0; i < count; i += 1) {
    const answer = http.post(`${base}/items`, body(`k6 item ${i}`), params('POST /items', base));
    if (answer.status !== 201) {
      throw new Error(`the service does not create items: ${answer.status} ${answer.body}`);
    }
    ids.push(answer.json('id'));
  }
  return ids;
}

// Removes them again; call it in `teardown`.
export function removeItems(ids, base = BASE_URL) {
  for (const id of ids) {
    http.del(`${base}/items/${id}`, null, params('DELETE /items/{id}', base));
  }
}

// The newest version of each item that this VU has seen.
const seen = {};

// Reads one item. An answer older than what this VU has seen before is a stale read.
export function read(id, base = BASE_URL) {
  const answer = http.get(`${base}/items/${id}`, params('GET /items/{id}', base));
  const ok = answer.status === 200;
  readErrors.add(!ok);
  readDuration.add(answer.timings.waiting);
  if (!ok) {
    return null;
  }
  const status = answer.headers['Cache-Status'] || '';
  const hit = status.includes('hit');
  hitRatio.add(hit);
  if (hit) {
    hitDuration.add(answer.timings.waiting);
  } else if (status.includes('fwd=miss')) {
    missDuration.add(answer.timings.waiting);
  } else {
    bypassDuration.add(answer.timings.waiting);
  }
  const version = answer.json('version');
  const fresh = version >= (seen[base + id] || 0);
  staleReads.add(fresh ? 0 : 1, { target: base });
  seen[base + id] = Math.max(version, seen[base + id] || 0);
  return version;
}

// Reads the first page.
export function list(base = BASE_URL) {
  const answer = http.get(`${base}/items?limit=10`, params('GET /items', base));
  readErrors.add(answer.status !== 200);
  readDuration.add(answer.timings.waiting);
}

// Updates an item and reads it back: the read must return this version or a newer one.
export function updateAndRead(id, base = BASE_URL) {
  const answer = http.put(`${base}/items/${id}`, body('k6 update'), params('PUT /items/{id}', base));
  const ok = answer.status === 200;
  writeErrors.add(!ok);
  writeDuration.add(answer.timings.waiting);
  if (!ok) {
    return;
  }
  const written = answer.json('version');
  seen[base + id] = Math.max(written, seen[base + id] || 0);
  const version = read(id, base);
  check(version, {
    'a read after an acknowledged update returns it': (v) => v === null || v >= written,
  });
}

// Creates an item and removes it.
export function createAndRemove(base = BASE_URL) {
  const created = http.post(`${base}/items`, body('k6 create'), params('POST /items', base));
  writeErrors.add(created.status !== 201);
  writeDuration.add(created.timings.waiting);
  if (created.status !== 201) {
    return;
  }
  const id = created.json('id');
  const removed = http.del(`${base}/items/${id}`, null, params('DELETE /items/{id}', base));
  writeErrors.add(removed.status !== 200);
  writeDuration.add(removed.timings.waiting);
}

// One step of the mix: 80 % reads, 20 % writes.
export function step(ids, base = BASE_URL) {
  const id = ids[Math.floor(Math.random() * ids.length)];
  const dice = Math.random();
  if (dice < 0.72) {
    read(id, base);
  } else if (dice < 0.8) {
    list(base);
  } else if (dice < 0.97) {
    updateAndRead(id, base);
  } else {
    createAndRemove(base);
  }
}
