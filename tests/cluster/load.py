"""Wait until the service answers, then send requests for some seconds, each on a new connection, and count outcomes.

    KEY=<API key> python load.py SECONDS [URL]

The last line of the output is JSON: the number of answers by model version, of other statuses, and of errors.
"""

import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections import Counter

BODY = {"transaction_id": "tx_12345", "amount": 150.5, "merchant_category": "grocery_stores", "hour": 14}
BODY |= {"day_of_week": 2, "user_age": 35, "account_balance": 2500.0}
HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ['KEY']}"}
seconds, *given = sys.argv[1:]
[url] = given or ["http://fraud-api.fraud-api"]

# Connections of a new pod are refused until every node has applied the network policy to it.
deadline = time.monotonic() + 60
while True:
    try:
        urllib.request.urlopen(f"{url}/health/live", timeout=5).close()
        break
    except OSError:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.1)

print("counting", flush=True)
outcomes: Counter[str] = Counter()
end = time.monotonic() + float(seconds)
while time.monotonic() < end:
    request = urllib.request.Request(f"{url}/predict", json.dumps(BODY).encode(), HEADERS)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            outcomes[json.load(answer)["model_version"]] += 1
    except urllib.error.HTTPError as error:
        outcomes[f"status {error.code}"] += 1
    except (OSError, http.client.HTTPException) as error:
        outcomes[f"{type(error).__name__}: {error}"] += 1
    time.sleep(0.01)
print(json.dumps(outcomes))
