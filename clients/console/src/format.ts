/** Numbers and times as people read them. */

/** A logit, with a real minus sign. */
export function logit(value: number | null): string {
  return value === null ? 'none' : value.toFixed(2).replace('-', '\u2212');
}

/** A distance to the threshold, always signed. */
export function signed(value: number): string {
  return `${value >= 0 ? '+' : '\u2212'}${Math.abs(value).toFixed(2)}`;
}

export function percent(share: number, digits = 1): string {
  return `${(share * 100).toFixed(digits)} %`;
}

export function count(number: number, singular: string, plural = `${singular}s`): string {
  return `${number.toLocaleString('en')} ${number === 1 ? singular : plural}`;
}

/** Seconds as the largest unit that they fill. */
export function duration(seconds: number): string {
  const units: [string, number][] = [
    ['day', 86_400],
    ['hour', 3_600],
    ['minute', 60],
  ];
  for (const [name, length] of units) {
    if (seconds >= length) return count(Math.floor(seconds / length), name);
  }
  return count(Math.max(0, Math.floor(seconds)), 'second');
}

/** Time of the day; the date instead of its seconds where it is another day. */
export function clock(iso: string): string {
  const time = new Date(iso);
  const isToday = time.toDateString() === new Date().toDateString();
  if (isToday) return `${hoursAndMinutes(time)}:${twoDigits(time.getSeconds())}`;
  return `${time.toLocaleDateString([], { month: 'short', day: 'numeric' })}, ${hoursAndMinutes(time)}`;
}

export function hoursAndMinutes(time: Date): string {
  return `${twoDigits(time.getHours())}:${twoDigits(time.getMinutes())}`;
}

function twoDigits(number: number): string {
  return String(number).padStart(2, '0');
}
