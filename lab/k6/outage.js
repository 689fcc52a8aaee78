// A steady load during which you stop Redis and start it again, from another terminal:
//
//   docker compose stop redis        writethrough lab stop redis
//   docker compose start redis       writethrough lab start redis
//
// It prints each change of the service's mode. Nothing may fail and nothing may be stale; writers wait once,
// for 1.3 s or so, when Redis goes away.

import http from 'k6/http';
import { sleep } from 'k6';
import exec from 'k6/execution';
import { BASE_URL, createItems, removeItems, step } from './items.js';

const DURATION = __ENV.DURATION || '60s';

export const options = {
  scenarios: {
    load: {
      executor: 'constant-arrival-rate',
      rate: Number(__ENV.RATE || 50),
      timeUnit: '1s',
      duration: DURATION,
      preAllocatedVUs: 50,
      maxVUs: 300,
    },
    watch: { executor: 'constant-vus', vus: 1, duration: DURATION, exec: 'watch' },
  },
  thresholds: {
    read_errors: ['rate==0'],
    write_errors: ['rate==0'],
    read_duration: ['p(95)<500'],
    write_duration: ['max<5000'],
    stale_reads: ['count==0'],
    checks: ['rate==1'],
  },
};

export function setup() {
  return createItems(20);
}

export default function (ids) {
  step(ids);
}

let last = '';

export function watch() {
  const answer = http.get(`${BASE_URL}/health`, { tags: { name: 'GET /health' } });
  const health = answer.json();
  const now = `status ${health.status}, mode ${health.mode}, epoch ${health.epoch}`;
  if (now !== last) {
    const seconds = ((Date.now() - exec.scenario.startTime) / 1000).toFixed(1);
    console.log(`after ${seconds} s: ${now}`);
    last = now;
  }
  sleep(0.2);
}

export function teardown(ids) {
  removeItems(ids);
}
