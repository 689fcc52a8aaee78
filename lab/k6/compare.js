// Compares modes: the same load against each target, one after the other, and a table at the end.
//
//   k6 run lab/k6/compare.js                                     the service at BASE_URL alone
//   k6 run -e TARGETS=strict=http://localhost:8000,textbook=http://localhost:8100 lab/k6/compare.js
//
// Targets need databases of their own: a node that does not follow the protocol spoils it for the others.

import http from 'k6/http';
import { Counter, Trend } from 'k6/metrics';
import { BASE_URL, createItems, list, removeItems } from './items.js';

const SECONDS = Number(__ENV.SECONDS || 15);
const VUS = Number(__ENV.VUS || 8);
const TARGETS = (__ENV.TARGETS || `service=${BASE_URL}`).split(',').map((pair) => {
  const at = pair.indexOf('=');
  return { name: pair.slice(0, at), url: pair.slice(at + 1) };
});

const measured = {};
const scenarios = {};
const thresholds = { http_req_failed: ['rate<0.01'] };
TARGETS.forEach(({ name }, index) => {
  measured[name] = {
    read: new Trend(`read_${name}`, true),
    write: new Trend(`write_${name}`, true),
    stale: new Counter(`stale_${name}`),
  };
  scenarios[name] = {
    executor: 'constant-vus',
    vus: VUS,
    duration: `${SECONDS}s`,
    startTime: `${index * (SECONDS + 1)}s`,
    env: { TARGET: name },
  };
  thresholds[`read_${name}`] = ['p(95)<250'];
  thresholds[`write_${name}`] = ['p(95)<500'];
  if (name === 'strict') {
    thresholds[`stale_${name}`] = ['count==0'];
  }
});

export const options = {
  scenarios,
  thresholds,
  summaryTrendStats: ['avg', 'med', 'p(95)', 'p(99)', 'max', 'count'],
};

export function setup() {
  const ids = {};
  for (const { name, url } of TARGETS) {
    ids[name] = createItems(8, url);
  }
  return ids;
}

const seen = {};

export default function (ids) {
  const name = __ENV.TARGET;
  const { url } = TARGETS.find((target) => target.name === name);
  const { read, write, stale } = measured[name];
  const id = ids[name][Math.floor(Math.random() * ids[name].length)];
  const tags = { tags: { name: `${name} item` }, headers: { 'Content-Type': 'application/json' } };
  const dice = Math.random();
  if (dice < 0.05) {
    list(url);
    return;
  }
  const writes = dice > 0.8;
  const before = seen[id] || 0;
  const answer = writes
    ? http.put(`${url}/items/${id}`, JSON.stringify({ name: 'k6 compare', price: 1 }), tags)
    : http.get(`${url}/items/${id}`, tags);
  (writes ? write : read).add(answer.timings.waiting);
  if (answer.status === 200) {
    const version = answer.json('version');
    stale.add(version < before ? 1 : 0);
    seen[id] = Math.max(before, version);
  }
}

export function teardown(ids) {
  for (const { name, url } of TARGETS) {
    removeItems(ids[name], url);
  }
}

export function handleSummary(data) {
  const number = (metric, value) => {
    const values = data.metrics[metric] && data.metrics[metric].values;
    return values && values[value] !== undefined ? values[value] : NaN;
  };
  const ms = (metric, value) => number(metric, value).toFixed(2).padStart(9);
  const lines = [
    '',
    'times in ms         read med  read p95 write med write p95     reads    writes  stale reads',
  ];
  for (const { name } of TARGETS) {
    const count = (metric) => String(number(metric, 'count') || 0).padStart(9);
    lines.push(
      `${name.padEnd(16)} ${ms(`read_${name}`, 'med')} ${ms(`read_${name}`, 'p(95)')} ` +
        `${ms(`write_${name}`, 'med')} ${ms(`write_${name}`, 'p(95)')} ` +
        `${count(`read_${name}`)} ${count(`write_${name}`)} ${count(`stale_${name}`).padStart(12)}`,
    );
  }
  const failed = Object.entries(data.metrics).flatMap(([metric, { thresholds: all }]) =>
    Object.entries(all || {})
      .filter(([, { ok }]) => !ok)
      .map(([rule]) => `${metric} ${rule}`),
  );
  lines.push('', failed.length ? `FAILED: ${failed.join('; ')}` : 'all thresholds passed', '');
  return { stdout: lines.join('\n') };
}
