/** The panel of the breaker: what it is, and what its calibration promises. */

import type { Breaker, Probe } from './api';
import { byId, el } from './dom';
import { count, duration, logit, percent } from './format';

/** Fills the panel in. */
export function showBreaker(breaker: Breaker): void {
  const { base_model: base, operating_point: point } = breaker;
  const facts: [string, string, string?][] = [
    ['Breaker', breaker.name],
    ['Digest', breaker.digest.slice(0, 16), breaker.digest],
    ['Base model', base.id],
    ['Policy', `${breaker.policy}: ${breaker.mode}, ${breaker.action}, judges ${breaker.phases.join(' and ')}`],
    ['Calibrated', `${duration(breaker.calibration_age_s)} ago`, breaker.created],
  ];
  if (base.revision) facts.splice(3, 0, ['Revision', base.revision.slice(0, 16), base.revision]);
  if (point === null) {
    facts.push(['Promise', 'none: thresholds or phases are the operator’s own']);
  } else {
    facts.push(
      ['Promise', `at most ${percent(point.target_fpr)} of benign conversations trip`],
      [
        'Measured',
        `${count(point.num_trips, 'trip')} in ${point.num_conversations.toLocaleString('en')}: at most ` +
          `${percent(point.fpr_upper_bound, 2)} (${percent(point.confidence, 0)} confidence)`,
      ],
      ['Holds up to', count(point.max_tokens, 'token')],
    );
  }
  byId('breaker-facts', HTMLDListElement).replaceChildren(
    ...facts.flatMap(([name, value, title]) => [
      el('dt', {}, name),
      el('dd', title === undefined ? {} : { title }, value),
    ]),
  );
  byId('breaker-probes', HTMLTableSectionElement).replaceChildren(
    ...breaker.probes.map((probe) =>
      el(
        'tr',
        {},
        el('td', {}, breaker.judged.includes(probe.name) ? probe.name : `${probe.name} (not judged)`),
        el('td', {}, (probe.layers ?? [probe.layer]).join(' + ')),
        el('td', {}, aggregation(probe)),
        el('td', { class: 'number' }, logit(probe.threshold_logit)),
      ),
    ),
  );
}

function aggregation({ aggregation: { kind, alpha, window } }: Probe): string {
  if (alpha !== undefined) return `${kind} ${alpha}`;
  return window === undefined ? kind : `${kind.replace('_', ' ')} of ${window}`;
}
