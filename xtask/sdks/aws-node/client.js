// Makes a signed call as the SDK named first does by itself; each line of input asks once more: `new` with a new client, `kept` with the
// one that lives as long as the process, `region` for the region that the SDK finds by itself. Arguments: the SDK (`v2` or `v3`), where
// STS is (host:port), the region. Prints JSON lines.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const require = createRequire(import.meta.url);
const [name, sts, region] = process.argv.slice(2);
const endpoint = `http://${sts}`;

function v2() {
  const AWS = require("aws-sdk");
  return {
    create: () => new AWS.STS({ endpoint, region }),
    call: (client) => client.getCallerIdentity().promise(),
    // It looks for none.
    findRegion: async () => null,
    version: AWS.VERSION,
  };
}

function v3() {
  const { STS } = require("@aws-sdk/client-sts");
  const manifest = new URL("node_modules/@aws-sdk/client-sts/package.json", import.meta.url);
  return {
    create: () => new STS({ endpoint, region }),
    call: (client) => client.getCallerIdentity({}),
    // It asks for the instance's region to choose its defaults, and tells whether that is the client's.
    findRegion: async () => {
      const mode = await new STS({ defaultsMode: "auto", endpoint, region }).config.defaultsMode();
      return mode === "in-region" ? region : mode;
    },
    version: JSON.parse(readFileSync(manifest, "utf8")).version,
  };
}

const sdk = { v2, v3 }[name]();
let kept;
for await (const line of createInterface({ input: process.stdin })) {
  const answer = { Version: sdk.version };
  if (line === "region") {
    answer.Region = await sdk.findRegion();
  } else {
    const begun = performance.now();
    const client = line === "kept" ? (kept ??= sdk.create()) : sdk.create();
    answer.Arn = (await sdk.call(client)).Arn;
    answer.Millis = Math.round(performance.now() - begun);
  }
  console.log(JSON.stringify(answer));
}
