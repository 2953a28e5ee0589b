/** The server's API: what the page asks for, and the shapes of the answers. */

import { type Guard, type TokenScore } from './scores';
import { eventsOf } from './sse';

export interface Probe {
  name: string;
  layer?: number;
  layers?: number[];
  aggregation: { kind: string; alpha?: number; window?: number };
  threshold_logit: number;
}

export interface PolicyState {
  policy: string;
  mode: 'observe' | 'enforce';
  action: 'stop' | 'refuse' | 'error';
  phases: string[];
  judged: string[];
  operating_point: OperatingPoint | null;
  probes: Probe[];
}

export interface OperatingPoint {
  target_fpr: number;
  confidence: number;
  num_conversations: number;
  num_trips: number;
  fpr_upper_bound: number;
  max_tokens: number;
}

export interface Breaker extends PolicyState {
  name: string;
  digest: string;
  created: string;
  calibration_age_s: number;
  base_model: { id: string; revision?: string | null; num_layers?: number };
  /** For admins only. */
  policies?: PolicyState[];
}

export interface Model {
  id: string;
  max_model_len: number;
}

export interface Trip {
  time: string;
  action: string;
  request_id: string;
  key_id: string;
  model: string;
  policy: string;
  phase: string;
  probe: string | null;
  score: number | null;
  threshold: number | null;
  token_index: number | null;
}

export interface TripPage {
  data: Trip[];
  num_pending: number;
}

export interface WhatIfGroup {
  policy: string;
  phase: string;
  num_requests: number;
  num_tripped: number;
  num_would_trip: number;
  num_unknown: number;
  share: number | null;
  share_low: number;
  share_high: number;
}

export interface WhatIf {
  since: string;
  is_complete: boolean;
  data: WhatIfGroup[];
  notes: string[];
}

export interface Message {
  role: 'system' | 'user' | 'assistant';
  content: string;
}

export interface ChatBody {
  model: string;
  messages: Message[];
  max_tokens: number;
  temperature: number;
  stream: true;
  stream_options: { include_usage: true };
  guard: { token_scores: true; policy?: string; mode?: 'enforce'; threshold?: number };
}

export interface Chunk {
  choices?: {
    delta?: { content?: string | null };
    finish_reason?: string | null;
    guard?: Guard | null;
    token_scores?: TokenScore[];
  }[];
  usage?: { prompt_tokens: number; completion_tokens: number } | null;
  error?: ErrorBody;
}

interface ErrorBody {
  message: string;
  code?: string | null;
  guard?: Guard | null;
  token_scores?: TokenScore[];
}

export const CHAT_PATH = '/v1/chat/completions';
const ADMIN_PATHS = '/v1/breaker/';

/** What the server says instead of an answer; status 0: it could not be reached. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    readonly body: ErrorBody,
  ) {
    super(body.message);
  }

  get code(): string | null {
    return this.body.code ?? null;
  }
}

export class Api {
  constructor(
    readonly key: string | null,
    /** Called when the server no longer takes the key. */
    readonly onRefused: () => void = () => {},
  ) {}

  async get<T>(path: string, query: Record<string, string> = {}, signal?: AbortSignal): Promise<T> {
    const search = new URLSearchParams(query).toString();
    const response = await this.#fetch(search ? `${path}?${search}` : path, { signal: signal ?? null });
    return (await response.json()) as T;
  }

  async text(path: string): Promise<string> {
    return await (await this.#fetch(path, {})).text();
  }

  /** The chunks of one streamed answer. */
  async *chat(body: ChatBody, signal: AbortSignal): AsyncGenerator<Chunk> {
    const response = await this.#fetch(CHAT_PATH, {
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify(body),
      signal,
    });
    if (response.body === null) throw new ApiError(0, { message: 'the answer has no body' });
    for await (const data of eventsOf(response.body)) {
      if (data === '[DONE]') return;
      const chunk = JSON.parse(data) as Chunk;
      if (chunk.error) throw new ApiError(200, chunk.error);
      yield chunk;
    }
    throw new ApiError(0, { message: 'the stream broke off before its end; send the message again' });
  }

  async #fetch(path: string, init: RequestInit): Promise<Response> {
    const headers = new Headers(init.headers);
    if (this.key !== null) headers.set('Authorization', `Bearer ${this.key}`);
    let response: Response;
    try {
      response = await fetch(path, { ...init, headers, credentials: 'omit', cache: 'no-store' });
    } catch (error) {
      if (init.signal?.aborted) throw error;
      throw new ApiError(0, { message: 'the server cannot be reached; is it running?' });
    }
    if (response.ok) return response;
    const error = new ApiError(response.status, await errorBody(response));
    // A server that wants no keys takes an old one for nobody's, and refuses what admins may read.
    const isRefused = error.status === 401 || (error.status === 403 && path.startsWith(ADMIN_PATHS));
    if (isRefused) this.onRefused();
    throw error;
  }
}

async function errorBody(response: Response): Promise<ErrorBody> {
  try {
    const { error } = (await response.json()) as { error: ErrorBody };
    if (typeof error.message === 'string') return error;
  } catch {
    // A proxy in front of the server may answer in its own format.
  }
  return { message: `HTTP ${response.status} ${response.statusText}`.trim() };
}
