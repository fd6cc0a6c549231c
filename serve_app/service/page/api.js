// The two endpoints. The key stays in this tab (sessionStorage) and goes into the Authorization header.

const KEY = "kvcache-key";
const TIMEOUT_MS = 10000;

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }

  get wantsKey() {
    return this.status === 401 || this.status === 403;
  }
}

export const setKey = (key) => sessionStorage.setItem(KEY, key);
export const forgetKey = () => sessionStorage.removeItem(KEY);
export const hasKey = () => sessionStorage.getItem(KEY) !== null;

/** GET v1/`name`, below the page's own path: it is the same at /kvcache/ and at /. */
export async function get(name, query) {
  const key = sessionStorage.getItem(KEY);
  const asked = new URLSearchParams(Object.entries(query).filter(([, value]) => value));
  const answer = await fetch(`v1/${name}?${asked}`, {
    headers: key === null ? {} : { authorization: `Bearer ${key}` },
    cache: "no-store",
    signal: AbortSignal.timeout(TIMEOUT_MS),
  });
  if (answer.ok) return answer.json();
  const error = await answer.json().then((body) => body.error, () => null);
  throw new Refused(answer.status, error?.message ?? `the service answers ${answer.status}`);
}
