// Obtains credentials as the SDK does by itself; each line of input asks once more: `new` with a new client, `kept` with the one that
// lives as long as the process. The argument is where STS is (host:port). Prints JSON lines.

import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const require = createRequire(import.meta.url);
const Credential = require("@alicloud/credentials").default;
const { default: OpenApi, $OpenApiUtil } = require("@alicloud/openapi-core");
const { RuntimeOptions } = require("@darabonba/typescript");
const { version } = require("@alicloud/credentials/package.json");

const params = new $OpenApiUtil.Params({
  action: "GetCallerIdentity",
  version: "2015-04-01",
  protocol: "HTTP",
  pathname: "/",
  method: "POST",
  authType: "AK",
  style: "RPC",
  reqBodyType: "formData",
  bodyType: "json",
});

let kept;
for await (const line of createInterface({ input: process.stdin })) {
  const credential = line === "kept" ? (kept ??= new Credential()) : new Credential();
  const given = await credential.getCredential();
  const api = new OpenApi(new $OpenApiUtil.Config({ credential, endpoint: process.argv[2], protocol: "http" }));
  const answer = await api.callApi(params, new $OpenApiUtil.OpenApiRequest({}), new RuntimeOptions({}));
  console.log(
    JSON.stringify({
      AccessKeyId: given.accessKeyId,
      AccessKeySecret: given.accessKeySecret,
      SecurityToken: given.securityToken,
      Arn: answer.body.Arn,
      Version: version,
    }),
  );
}
