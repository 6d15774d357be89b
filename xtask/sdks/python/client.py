"""Obtains credentials as the SDK named first does by itself; each line of input asks once more, with a new provider.

Arguments: the SDK, where STS is (host:port), the pod's role (for SDKs that cannot ask which role they have). Prints JSON lines.
"""

import json
import sys
from importlib.metadata import version

METADATA = "http://100.100.100.200/latest/meta-data/ram/security-credentials/"


def credentials(sts, _role):
    from alibabacloud_credentials.client import Client
    from alibabacloud_tea_openapi import models
    from alibabacloud_tea_openapi.client import Client as OpenApi
    from alibabacloud_tea_openapi.utils_models import OpenApiRequest, Params
    from darabonba.runtime import RuntimeOptions

    client = Client()
    given = client.get_credential()
    params = Params(action="GetCallerIdentity", version="2015-04-01", protocol="HTTP", pathname="/", method="POST",
                    auth_type="AK", style="RPC", req_body_type="formData", body_type="json")
    api = OpenApi(models.Config(credential=client, endpoint=sts, protocol="http"))
    answer = api.call_api(params, OpenApiRequest(), RuntimeOptions(no_proxy=sts))
    return [given.access_key_id, given.access_key_secret, given.security_token, answer["body"]["Arn"]]


def core(sts, role):
    from aliyunsdkcore.auth.credentials import EcsRamRoleCredential
    from aliyunsdkcore.client import AcsClient
    from aliyunsdkcore.request import CommonRequest

    host, port = sts.split(":")
    client = AcsClient(region_id="cn-hangzhou", credential=EcsRamRoleCredential(role), port=int(port))
    request = CommonRequest(domain=host, version="2015-04-01", action_name="GetCallerIdentity")
    request.set_protocol_type("http")
    request.set_accept_format("json")
    answer = json.loads(client.do_action_with_exception(request))
    return [*client._signer._session_credential, answer["Arn"]]


def oss(_sts, role):
    from oss2.credentials import EcsRamRoleCredentialsProvider

    given = EcsRamRoleCredentialsProvider(METADATA + role).get_credentials()
    return [given.access_key_id, given.access_key_secret, given.security_token, None]


def main():
    sdk, sts, role = sys.argv[1:]
    ask = {"alibabacloud-credentials": credentials, "aliyun-python-sdk-core": core, "oss2": oss}[sdk]
    for _ in sys.stdin:
        values = [*ask(sts, role), version(sdk)]
        names = ["AccessKeyId", "AccessKeySecret", "SecurityToken", "Arn", "Version"]
        print(json.dumps(dict(zip(names, values))), flush=True)


main()
