// Fetches the list of roles from the metadata server by each URL that is given, in every way that Node has, and prints what all of these
// got, one line for each URL.

import http from "node:http";

const BOTH = [
  { address: "fd00:100::100:200", family: 6 },
  { address: "100.100.100.200", family: 4 },
];

function get(url, options) {
  return new Promise((resolve, reject) => {
    const request = http.get(url, { timeout: 5000, ...options }, (response) => {
      let body = "";
      response.on("data", (chunk) => (body += chunk));
      response.on("end", () => resolve(`${response.statusCode} ${body}`));
    });
    request.on("timeout", () => request.destroy(new Error(`${url} does not answer`)));
    request.on("error", reject);
  });
}

async function fetched(url) {
  const response = await fetch(url, { signal: AbortSignal.timeout(5000) });
  return `${response.status} ${await response.text()}`;
}

// A name with addresses of both families: Node tries them in this order ("happy eyeballs").
function byName(url, addresses) {
  const named = new URL(url);
  named.hostname = "metadata.example";
  return get(named, { agent: false, autoSelectFamily: true, lookup: (_name, _options, done) => done(null, addresses) });
}

for (const url of process.argv.slice(2)) {
  const answers = [await fetched(url), await get(url, {}), await byName(url, BOTH), await byName(url, BOTH.toReversed())];
  if (new Set(answers).size !== 1) {
    throw new Error(`${url} is answered with ${JSON.stringify(answers)}`);
  }
  console.log(answers[0]);
}
