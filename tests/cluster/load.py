"""One request after another for so many seconds, each on a connection of its own; then what came of them, as JSON."""

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
outcomes: Counter[str] = Counter()
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    request = urllib.request.Request("http://fraud-api.fraud-api/predict", json.dumps(BODY).encode(), HEADERS)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            outcomes[json.load(answer)["model_version"]] += 1
    except urllib.error.HTTPError as error:
        outcomes[f"status {error.code}"] += 1
    except OSError as error:
        outcomes[type(error).__name__] += 1
    time.sleep(0.01)
print(json.dumps(outcomes))
