/** The score of a token: how far it is from its threshold, and how that is shown. */

export interface TokenScore {
  /** Position in prompt and completion. */
  index: number;
  phase: 'prompt' | 'completion';
  /** Null where the server withholds it. */
  token: string | null;
  /** Running score of the probe that is nearest to its threshold; null where none is judged. */
  score: number | null;
  probe: string | null;
  threshold: number | null;
}

export interface Guard {
  policy: string;
  mode: 'observe' | 'enforce';
  tripped: boolean;
  phase: 'prompt' | 'completion' | null;
  probe: string | null;
  score: number | null;
  threshold: number | null;
  token_index: number | null;
}

/** Lower ends of the bands in logits above the threshold; the last one trips. */
export const BAND_EDGES = [-10, -5, -2.5, -1, 0];

/** Score minus threshold: at 0 and above the token trips. */
export function margin(item: TokenScore): number | null {
  return item.score === null || item.threshold === null ? null : item.score - item.threshold;
}

/** 0 for far below the threshold, BAND_EDGES.length for a trip; null without a score. */
export function band(item: TokenScore): number | null {
  const distance = margin(item);
  return distance === null ? null : BAND_EDGES.filter((edge) => distance >= edge).length;
}

const SPECIAL = /^(<[|｜][^\s]*[|｜]>|<\/?s>|<(bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[\/?INST\])$/;

/** Whether a token is one of the chat template's marks, and no text. */
export function isSpecial(token: string): boolean {
  return SPECIAL.test(token);
}
