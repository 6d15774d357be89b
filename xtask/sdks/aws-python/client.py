"""Makes a signed call as the SDK does by itself; each line of input asks once more: `new` with a new session, `kept` with the one that
lives as long as the process, `later` with that one and its credentials' clock moved, `region` for the region that the SDK finds by itself.

Arguments: where STS is (host:port), the region. Prints JSON lines.
"""

import json
import sys
import time
from datetime import timedelta

import boto3
import botocore.session
from botocore.utils import IMDSRegionProvider


class Caller:
    """A session and its client of STS."""

    def __init__(self, sts, region):
        self.session = boto3.session.Session()
        self.client = self.session.client("sts", region_name=region, endpoint_url=f"http://{sts}")

    def arn(self):
        return self.client.get_caller_identity()["Arn"]

    def refresh(self):
        """Lets the credentials' clock be 50 minutes on for a moment: they have 10 minutes left then, and are fetched again."""
        credentials = self.session.get_credentials()
        now = credentials._time_fetcher
        credentials._time_fetcher = lambda: now() + timedelta(minutes=50)
        credentials.get_frozen_credentials()
        credentials._time_fetcher = now


def main():
    sts, region = sys.argv[1:]
    kept = None
    for line in sys.stdin:
        how = line.strip()
        answer = {"Version": boto3.__version__}
        begun = time.monotonic()
        if how == "region":
            # What a client with `defaults_mode="auto"` asks.
            answer["Region"] = IMDSRegionProvider(botocore.session.get_session()).provide()
        else:
            caller = kept if kept and how != "new" else Caller(sts, region)
            if how != "new":
                kept = caller
            if how == "later":
                caller.refresh()
            answer["Arn"] = caller.arn()
            answer["Millis"] = round((time.monotonic() - begun) * 1000)
        print(json.dumps(answer), flush=True)


main()
