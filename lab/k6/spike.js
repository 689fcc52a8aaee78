// A spike: from 50 requests a second to PEAK (default 400) within seconds, and back.
//
// Arrivals do not wait for answers, so a service that slows down gets more requests at once, as in real life.

import { createItems, removeItems, step } from './items.js';

const PEAK = Number(__ENV.PEAK || 400);

export const options = {
  scenarios: {
    spike: {
      executor: 'ramping-arrival-rate',
      startRate: 50,
      timeUnit: '1s',
      preAllocatedVUs: 50,
      maxVUs: 500,
      stages: [
        { target: 50, duration: '5s' },
        { target: PEAK, duration: '3s' },
        { target: PEAK, duration: __ENV.HOLD || '15s' },
        { target: 50, duration: '3s' },
        { target: 50, duration: '5s' },
      ],
    },
  },
  thresholds: {
    read_errors: ['rate<0.01'],
    write_errors: ['rate<0.01'],
    read_duration: ['p(95)<250'],
    write_duration: ['p(95)<500'],
    stale_reads: ['count==0'],
    checks: ['rate==1'],
  },
};

export function setup() {
  return createItems(50);
}

export default function (ids) {
  step(ids);
}

export function teardown(ids) {
  removeItems(ids);
}
