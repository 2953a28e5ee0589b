/** Which policies a request may ask for: those that are at least as strict as its own. */

import type { PolicyState } from './api';

const WITHHOLDS = ['stop', 'refuse', 'error'];

/** Why the server would refuse `asked` in the place of `own`; null where it would not. */
export function loosening(own: PolicyState, asked: PolicyState): string | null {
  if (own.mode === 'enforce' && asked.mode !== 'enforce') return 'only observes';
  const phase = own.phases.find((name) => !asked.phases.includes(name));
  if (phase !== undefined) return `does not judge the ${phase}`;
  for (const probe of own.probes) {
    if (!own.judged.includes(probe.name)) continue;
    const other = asked.probes.find(({ name }) => name === probe.name);
    if (other === undefined || !asked.judged.includes(probe.name)) return `does not judge ${probe.name}`;
    if (other.threshold_logit > probe.threshold_logit) return `has a higher threshold for ${probe.name}`;
    const thinsOut = asked.phases.includes('prompt') && !own.phases.includes('prompt');
    if (probe.aggregation.kind !== 'max' && thinsOut) return `thins the mean of ${probe.name} out`;
  }
  const isWeaker = WITHHOLDS.indexOf(asked.action) < WITHHOLDS.indexOf(own.action);
  return isWeaker ? 'shows the text up to a trip' : null;
}

/** The highest threshold for all probes that loosens none of them. */
export function highestThreshold(policy: PolicyState): number {
  const judged = policy.probes.filter(({ name }) => policy.judged.includes(name));
  return Math.min(...judged.map((probe) => probe.threshold_logit));
}
