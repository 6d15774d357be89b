"""Obtains credentials as the SDK named first does by itself; each line of input asks once more: `new` with a new client, `kept` with
the one that lives as long as the process, `later` with that one and the process's clock moved by an hour.

Arguments: the SDK, where STS is (host:port), the pod's role (for SDKs that cannot ask which role they have). Prints JSON lines.
"""

import json
import sys
import time
from importlib.metadata import version

METADATA = "http://100.100.100.200/latest/meta-data/ram/security-credentials/"


def credentials(sts, _role):
    """A function that asks, with one client."""
    from alibabacloud_credentials.client import Client
    from alibabacloud_tea_openapi import models
    from alibabacloud_tea_openapi.client import Client as OpenApi
    from alibabacloud_tea_openapi.utils_models import OpenApiRequest, Params
    from darabonba.runtime import RuntimeOptions

    client = Client()
    params = Params(action="GetCallerIdentity", version="2015-04-01", protocol="HTTP", pathname="/", method="POST",
                    auth_type="AK", style="RPC", req_body_type="formData", body_type="json")
    api = OpenApi(models.Config(credential=client, endpoint=sts, protocol="http"))

    def ask():
        given = client.get_credential()
        answer = api.call_api(params, OpenApiRequest(), RuntimeOptions(no_proxy=sts))
        return [given.access_key_id, given.access_key_secret, given.security_token, answer["body"]["Arn"]]

    return ask


def core(sts, role):
    from aliyunsdkcore.auth.credentials import EcsRamRoleCredential
    from aliyunsdkcore.client import AcsClient
    from aliyunsdkcore.request import CommonRequest

    host, port = sts.split(":")
    client = AcsClient(region_id="cn-hangzhou", credential=EcsRamRoleCredential(role), port=int(port))

    def ask():
        request = CommonRequest(domain=host, version="2015-04-01", action_name="GetCallerIdentity")
        request.set_protocol_type("http")
        request.set_accept_format("json")
        answer = json.loads(client.do_action_with_exception(request))
        return [*client._signer._session_credential, answer["Arn"]]

    return ask


def oss(_sts, role):
    from oss2.credentials import EcsRamRoleCredentialsProvider

    provider = EcsRamRoleCredentialsProvider(METADATA + role)

    def ask():
        given = provider.get_credentials()
        return [given.access_key_id, given.access_key_secret, given.security_token, None]

    return ask


def main():
    sdk, sts, role = sys.argv[1:]
    client = {"alibabacloud-credentials": credentials, "aliyun-python-sdk-core": core, "oss2": oss}[sdk]
    kept = None
    now = time.time
    for line in sys.stdin:
        if line.strip() == "later":
            time.time = lambda: now() + 3600
        if line.strip() in ("kept", "later"):
            kept = ask = kept or client(sts, role)
        else:
            ask = client(sts, role)
        values = [*ask(), version(sdk)]
        names = ["AccessKeyId", "AccessKeySecret", "SecurityToken", "Arn", "Version"]
        print(json.dumps(dict(zip(names, values))), flush=True)


main()
