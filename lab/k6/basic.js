// The load test of exercise 7: 80 % reads, 20 % writes, and thresholds on errors, latency and staleness.
//
//   docker compose run --rm k6 run /scripts/basic.js
//   k6 run lab/k6/basic.js                      without Docker
//   k6 run -e VUS=50 -e DURATION=2m lab/k6/basic.js

import { sleep } from 'k6';
import { createItems, removeItems, step } from './items.js';

const VUS = Number(__ENV.VUS || 20);

export const options = {
  scenarios: {
    mixed: { executor: 'constant-vus', vus: VUS, duration: __ENV.DURATION || '30s' },
  },
  thresholds: {
    read_errors: ['rate<0.01'],
    write_errors: ['rate<0.01'],
    read_duration: ['p(95)<100'],
    write_duration: ['p(95)<250'],
    hit_ratio: ['rate>0.5'],
    stale_reads: ['count==0'],
    checks: ['rate==1'],
  },
};

export function setup() {
  return createItems(50);
}

export default function (ids) {
  step(ids);
  sleep(Math.random() * 0.05);
}

export function teardown(ids) {
  removeItems(ids);
}
