// A steady load for a long time (DURATION, default 10 minutes): looks for what only time shows.

import { createItems, removeItems, step } from './items.js';

export const options = {
  scenarios: {
    soak: {
      executor: 'constant-arrival-rate',
      rate: Number(__ENV.RATE || 100),
      timeUnit: '1s',
      duration: __ENV.DURATION || '10m',
      preAllocatedVUs: 50,
      maxVUs: 200,
    },
  },
  thresholds: {
    read_errors: ['rate<0.001'],
    write_errors: ['rate<0.001'],
    read_duration: ['p(95)<100', 'p(99)<500'],
    write_duration: ['p(95)<250'],
    hit_ratio: ['rate>0.5'],
    stale_reads: ['count==0'],
    checks: ['rate==1'],
    dropped_iterations: ['count<100'],
  },
};

export function setup() {
  return createItems(200);
}

export default function (ids) {
  step(ids);
}

export function teardown(ids) {
  removeItems(ids);
}
